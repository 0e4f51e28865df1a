"""VAN-B0, Semantic FPN: 38.5 mIoU published.

zoo train ade20k/van/semantic_fpn_van_b0 --cfg-options model.backbone.checkpoint=FILE

configs/sem_fpn/fpn_van_b0_ade20k_40k.py. The drop path is inherited from the config of B2. Figure: README.md.
"""

_base_ = './_semantic_fpn.py'

model = dict(backbone=dict(name='van_b0', drop_path_rate=0.2))
recipe = dict(drop_path=0.2)
