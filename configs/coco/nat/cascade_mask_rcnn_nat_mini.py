"""NAT-Mini, Cascade Mask R-CNN 3x: 50.3 box AP, 43.6 mask AP published.

zoo train coco/nat/cascade_mask_rcnn_nat_mini --cfg-options model.backbone.checkpoint=FILE

detection/configs/nat/cascade_mask_rcnn_nat_mini.*.py. Figures: detection/NAT.md.
"""

_base_ = './_cascade.py'

model = dict(backbone=dict(name='nat_mini', drop_path_rate=0.2))
recipe = dict(drop_path=0.2)
