"""NAT-Base, UPerNet: 48.5 mIoU published, 49.7 of several scales.

zoo train ade20k/nat/upernet_nat_base --cfg-options model.backbone.checkpoint=FILE

segmentation/configs/nat/upernet_nat_base_512x512_160k_ade20k.py.
Figures: segmentation/NAT.md.
"""

_base_ = './_upernet.py'

model = dict(backbone=dict(name='nat_base', drop_path_rate=0.5))
recipe = dict(drop_path=0.5)
