"""VAN-B2, Semantic FPN: 46.7 mIoU published.

zoo train ade20k/van/semantic_fpn_van_b2 --cfg-options model.backbone.checkpoint=FILE

configs/sem_fpn/fpn_van_b2_ade20k_40k.py. Figure: README.md.
"""

_base_ = './_semantic_fpn.py'

model = dict(backbone=dict(name='van_b2', drop_path_rate=0.2))
recipe = dict(drop_path=0.2)
