"""VAN-B4, Semantic FPN: no figure published.

zoo train ade20k/van/semantic_fpn_van_b4 --cfg-options model.backbone.checkpoint=FILE

configs/sem_fpn/fpn_van_b4_ade20k_40k.py.
"""

_base_ = './_semantic_fpn.py'

model = dict(backbone=dict(name='van_b4', drop_path_rate=0.4))
recipe = dict(drop_path=0.4)
