"""NAT-Small, Mask R-CNN 3x: 48.4 box AP, 43.2 mask AP published.

zoo train coco/nat/mask_rcnn_nat_small --cfg-options model.backbone.checkpoint=FILE

detection/configs/nat/mask_rcnn_nat_small.*.py. Figures: detection/NAT.md.
"""

_base_ = './_mask_rcnn.py'

model = dict(backbone=dict(name='nat_small', drop_path_rate=0.35))
recipe = dict(drop_path=0.35)
