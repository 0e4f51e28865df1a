"""NAT-Small, Cascade Mask R-CNN 3x: 52.0 box AP, 44.9 mask AP published.

zoo train coco/nat/cascade_mask_rcnn_nat_small --cfg-options model.backbone.checkpoint=FILE

detection/configs/nat/cascade_mask_rcnn_nat_small.*.py. Figures: detection/NAT.md.
"""

_base_ = './_cascade.py'

model = dict(backbone=dict(name='nat_small', drop_path_rate=0.3))
recipe = dict(drop_path=0.3)
