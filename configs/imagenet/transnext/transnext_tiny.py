"""TransNeXt-Tiny on ImageNet-1k: 84.0 % top-1 published.

zoo train imagenet/transnext/transnext_tiny

Drop path: configs/transnext_tiny.py:3. Accuracy: README.md.
"""

_base_ = './_transnext.py'

model = dict(backbone=dict(name='transnext_tiny', drop_path_rate=0.25))
recipe = dict(drop_path=0.25, top1=84.0)
