"""TransNeXt-Small, UPerNet: 52.2 mIoU published, 52.5 of several scales.

zoo train ade20k/transnext/upernet_transnext_small --cfg-options model.backbone.checkpoint=FILE

With extrapolated biases 52.8. Drop path: transnext_native.py. Figures: README.md.
"""

_base_ = './_upernet.py'

model = dict(backbone=dict(name='transnext_small', drop_path_rate=0.6))
recipe = dict(drop_path=0.6)
