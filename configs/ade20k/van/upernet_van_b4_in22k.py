"""VAN-B4, UPerNet, from ImageNet-22k: 53.5 mIoU published, of several scales.

zoo train ade20k/van/upernet_van_b4_in22k --cfg-options model.backbone.checkpoint=FILE

configs/upernet/22k_pretrained. Figure: README.md.
"""

_base_ = './_upernet.py'

model = dict(backbone=dict(name='van_b4', drop_path_rate=0.4))
total_batch = 32
recipe = dict(drop_path=0.4, total_batch=32)
