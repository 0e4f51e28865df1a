"""VAN-B2 on ImageNet-1k: 82.8 % top-1 published.

zoo train imagenet/van/van_b2

Drop path: train.sh:2. Accuracy: README.md.
"""

_base_ = './_van.py'

model = dict(backbone=dict(name='van_b2', drop_path_rate=0.1))
recipe = dict(drop_path=0.1, top1=82.8)
