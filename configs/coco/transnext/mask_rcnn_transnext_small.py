"""TransNeXt-Small, Mask R-CNN 1x: 51.1 box AP, 45.5 mask AP published.

zoo train coco/transnext/mask_rcnn_transnext_small --cfg-options model.backbone.checkpoint=FILE

detection/maskrcnn/configs/mask_rcnn_transnext_small_fpn_1x_coco.py; drop path: transnext_native.py.
Figures: README.md.
"""

_base_ = './_mask_rcnn.py'

model = dict(backbone=dict(name='transnext_small', drop_path_rate=0.6))
recipe = dict(drop_path=0.6)
