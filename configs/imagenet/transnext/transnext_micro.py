"""TransNeXt-Micro on ImageNet-1k: 82.5 % top-1 published.

zoo train imagenet/transnext/transnext_micro

Drop path: configs/transnext_micro.py:3. Accuracy: README.md.
"""

_base_ = './_transnext.py'

model = dict(backbone=dict(name='transnext_micro', drop_path_rate=0.15))
recipe = dict(drop_path=0.15, top1=82.5)
