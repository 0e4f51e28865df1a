"""NAT-Tiny, Mask R-CNN 3x: 47.7 box AP, 42.6 mask AP published.

zoo train coco/nat/mask_rcnn_nat_tiny --cfg-options model.backbone.checkpoint=FILE

detection/configs/nat/mask_rcnn_nat_tiny.*.py. Figures: detection/NAT.md.
"""

_base_ = './_mask_rcnn.py'

model = dict(backbone=dict(name='nat_tiny', drop_path_rate=0.2))
recipe = dict(drop_path=0.2)
