"""NAT-Small, UPerNet: 48.0 mIoU published, 49.5 of several scales.

zoo train ade20k/nat/upernet_nat_small --cfg-options model.backbone.checkpoint=FILE

segmentation/configs/nat/upernet_nat_small_512x512_160k_ade20k.py.
Figures: segmentation/NAT.md.
"""

_base_ = './_upernet.py'

model = dict(backbone=dict(name='nat_small', drop_path_rate=0.5))
recipe = dict(drop_path=0.5)
