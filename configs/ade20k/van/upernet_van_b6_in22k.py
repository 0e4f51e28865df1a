"""VAN-B6, UPerNet, from ImageNet-22k: 54.7 mIoU published, of several scales.

zoo train ade20k/van/upernet_van_b6_in22k --cfg-options model.backbone.checkpoint=FILE

configs/upernet/22k_pretrained. Figure: README.md.
"""

_base_ = './_upernet.py'

model = dict(backbone=dict(name='van_b6', drop_path_rate=0.5))
total_batch = 32
recipe = dict(drop_path=0.5, total_batch=32)
