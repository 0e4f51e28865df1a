"""BiFormer-S, UPerNet: 49.8 mIoU published, 50.8 of several scales.

zoo train ade20k/biformer/upernet_biformer_small --cfg-options model.backbone.checkpoint=FILE

semantic_segmentation/configs/ade20k/upernet.biformer_small.py:22-64. Figures: README.md.
"""

_base_ = './_upernet.py'

model = dict(backbone=dict(name='biformer_small', drop_path_rate=0.3))
recipe = dict(drop_path=0.3)
