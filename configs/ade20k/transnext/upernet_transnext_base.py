"""TransNeXt-Base, UPerNet: 53.0 mIoU published, 53.5 of several scales.

zoo train ade20k/transnext/upernet_transnext_base --cfg-options model.backbone.checkpoint=FILE

With extrapolated biases 53.7. Drop path: transnext_native.py. Figures: README.md.
"""

_base_ = './_upernet.py'

model = dict(backbone=dict(name='transnext_base', drop_path_rate=0.7))
recipe = dict(drop_path=0.7)
