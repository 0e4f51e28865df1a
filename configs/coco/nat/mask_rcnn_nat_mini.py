"""NAT-Mini, Mask R-CNN 3x: 46.5 box AP, 41.7 mask AP published.

zoo train coco/nat/mask_rcnn_nat_mini --cfg-options model.backbone.checkpoint=FILE

detection/configs/nat/mask_rcnn_nat_mini.*.py. Figures: detection/NAT.md.
"""

_base_ = './_mask_rcnn.py'

model = dict(backbone=dict(name='nat_mini', drop_path_rate=0.2))
recipe = dict(drop_path=0.2)
