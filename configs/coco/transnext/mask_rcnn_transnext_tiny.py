"""TransNeXt-Tiny, Mask R-CNN 1x: 49.9 box AP, 44.6 mask AP published.

zoo train coco/transnext/mask_rcnn_transnext_tiny --cfg-options model.backbone.checkpoint=FILE

detection/maskrcnn/configs/mask_rcnn_transnext_tiny_fpn_1x_coco.py; drop path: transnext_native.py.
Figures: README.md.
"""

_base_ = './_mask_rcnn.py'

model = dict(backbone=dict(name='transnext_tiny', drop_path_rate=0.4))
recipe = dict(drop_path=0.4)
