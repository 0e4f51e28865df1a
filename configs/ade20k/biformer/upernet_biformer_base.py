"""BiFormer-B, UPerNet: 51.0 mIoU published, 51.7 of several scales.

zoo train ade20k/biformer/upernet_biformer_base --cfg-options model.backbone.checkpoint=FILE

semantic_segmentation/configs/ade20k/upernet.biformer_base.py:22-64. Figures: README.md.
"""

_base_ = './_upernet.py'

model = dict(backbone=dict(name='biformer_base', drop_path_rate=0.4))
recipe = dict(drop_path=0.4)
