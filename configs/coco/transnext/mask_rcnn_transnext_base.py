"""TransNeXt-Base, Mask R-CNN 1x: 51.7 box AP, 45.9 mask AP published.

zoo train coco/transnext/mask_rcnn_transnext_base --cfg-options model.backbone.checkpoint=FILE

detection/maskrcnn/configs/mask_rcnn_transnext_base_fpn_1x_coco.py; drop path: transnext_native.py.
Figures: README.md.
"""

_base_ = './_mask_rcnn.py'

model = dict(backbone=dict(name='transnext_base', drop_path_rate=0.7))
optim_wrapper = dict(type='AutocastOptimWrapper', dtype='float16', loss_scale=512.0)
recipe = dict(drop_path=0.7, precision='float16')
