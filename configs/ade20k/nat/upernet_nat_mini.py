"""NAT-Mini, UPerNet: 45.1 mIoU published, 46.4 of several scales.

zoo train ade20k/nat/upernet_nat_mini --cfg-options model.backbone.checkpoint=FILE

segmentation/configs/nat/upernet_nat_mini_512x512_160k_ade20k.py.
Figures: segmentation/NAT.md.
"""

_base_ = './_upernet.py'

model = dict(backbone=dict(name='nat_mini', drop_path_rate=0.2))
recipe = dict(drop_path=0.2)
