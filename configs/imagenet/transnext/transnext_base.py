"""TransNeXt-Base on ImageNet-1k: 84.8 % top-1 published.

zoo train imagenet/transnext/transnext_base

Drop path: configs/transnext_base.py:3. Accuracy: README.md.
"""

_base_ = './_transnext.py'

model = dict(backbone=dict(name='transnext_base', drop_path_rate=0.6))
recipe = dict(drop_path=0.6, top1=84.8)
