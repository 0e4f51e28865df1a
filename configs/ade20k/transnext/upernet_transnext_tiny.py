"""TransNeXt-Tiny, UPerNet: 51.1 mIoU published, 51.5 of several scales.

zoo train ade20k/transnext/upernet_transnext_tiny --cfg-options model.backbone.checkpoint=FILE

With extrapolated biases 51.7. Drop path: transnext_native.py. Figures: README.md.
"""

_base_ = './_upernet.py'

model = dict(backbone=dict(name='transnext_tiny', drop_path_rate=0.4))
recipe = dict(drop_path=0.4)
