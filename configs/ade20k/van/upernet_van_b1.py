"""VAN-B1, UPerNet: 44.9 mIoU published, of several scales.

zoo train ade20k/van/upernet_van_b1 --cfg-options model.backbone.checkpoint=FILE

configs/upernet/1k_pretrained. Figure: README.md.
"""

_base_ = './_upernet.py'

model = dict(backbone=dict(name='van_b1', drop_path_rate=0.1))
recipe = dict(drop_path=0.1)
