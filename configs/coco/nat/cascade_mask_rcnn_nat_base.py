"""NAT-Base, Cascade Mask R-CNN 3x: 52.3 box AP, 45.1 mask AP published.

zoo train coco/nat/cascade_mask_rcnn_nat_base --cfg-options model.backbone.checkpoint=FILE

detection/configs/nat/cascade_mask_rcnn_nat_base.*.py. Figures: detection/NAT.md.
"""

_base_ = './_cascade.py'

model = dict(backbone=dict(name='nat_base', drop_path_rate=0.5))
recipe = dict(drop_path=0.5)
