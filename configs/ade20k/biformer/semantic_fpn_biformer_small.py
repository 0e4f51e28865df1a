"""BiFormer-S, Semantic FPN: 48.9 mIoU published.

zoo train ade20k/biformer/semantic_fpn_biformer_small --cfg-options model.backbone.checkpoint=FILE

semantic_segmentation/configs/ade20k/sfpn.biformer_small.py:22-60. Figure: README.md.
"""

_base_ = './_semantic_fpn.py'

model = dict(backbone=dict(name='biformer_small', drop_path_rate=0.15))
recipe = dict(drop_path=0.15)
