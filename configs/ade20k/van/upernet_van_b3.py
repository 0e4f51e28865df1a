"""VAN-B3, UPerNet: 50.6 mIoU published, of several scales.

zoo train ade20k/van/upernet_van_b3 --cfg-options model.backbone.checkpoint=FILE

configs/upernet/1k_pretrained. Figure: README.md.
"""

_base_ = './_upernet.py'

model = dict(backbone=dict(name='van_b3', drop_path_rate=0.3))
recipe = dict(drop_path=0.3)
