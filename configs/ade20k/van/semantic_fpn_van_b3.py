"""VAN-B3, Semantic FPN: 48.1 mIoU published.

zoo train ade20k/van/semantic_fpn_van_b3 --cfg-options model.backbone.checkpoint=FILE

configs/sem_fpn/fpn_van_b3_ade20k_40k.py. Figure: README.md.
"""

_base_ = './_semantic_fpn.py'

model = dict(backbone=dict(name='van_b3', drop_path_rate=0.3))
recipe = dict(drop_path=0.3)
