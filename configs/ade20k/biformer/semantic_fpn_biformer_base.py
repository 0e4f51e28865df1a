"""BiFormer-B, Semantic FPN: 49.9 mIoU published.

zoo train ade20k/biformer/semantic_fpn_biformer_base --cfg-options model.backbone.checkpoint=FILE

semantic_segmentation/configs/ade20k/sfpn.biformer_base.py:22-60. Figure: README.md.
"""

_base_ = './_semantic_fpn.py'

model = dict(backbone=dict(name='biformer_base', drop_path_rate=0.3))
recipe = dict(drop_path=0.3)
