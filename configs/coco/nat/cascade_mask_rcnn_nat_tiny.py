"""NAT-Tiny, Cascade Mask R-CNN 3x: 51.4 box AP, 44.5 mask AP published.

zoo train coco/nat/cascade_mask_rcnn_nat_tiny --cfg-options model.backbone.checkpoint=FILE

detection/configs/nat/cascade_mask_rcnn_nat_tiny.*.py. Figures: detection/NAT.md.
"""

_base_ = './_cascade.py'

model = dict(backbone=dict(name='nat_tiny', drop_path_rate=0.3))
recipe = dict(drop_path=0.3)
