"""NAT-Tiny, UPerNet: 47.1 mIoU published, 48.4 of several scales.

zoo train ade20k/nat/upernet_nat_tiny --cfg-options model.backbone.checkpoint=FILE

segmentation/configs/nat/upernet_nat_tiny_512x512_160k_ade20k.py.
Figures: segmentation/NAT.md.
"""

_base_ = './_upernet.py'

model = dict(backbone=dict(name='nat_tiny', drop_path_rate=0.3))
recipe = dict(drop_path=0.3)
