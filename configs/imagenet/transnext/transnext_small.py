"""TransNeXt-Small on ImageNet-1k: 84.7 % top-1 published.

zoo train imagenet/transnext/transnext_small

Drop path: configs/transnext_small.py:3. Accuracy: README.md.
"""

_base_ = './_transnext.py'

model = dict(backbone=dict(name='transnext_small', drop_path_rate=0.45))
recipe = dict(drop_path=0.45, top1=84.7)
