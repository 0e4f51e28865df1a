"""VAN-B1 on ImageNet-1k: 81.1 % top-1 published.

zoo train imagenet/van/van_b1

Drop path: train.sh:2. Accuracy: README.md.
"""

_base_ = './_van.py'

model = dict(backbone=dict(name='van_b1', drop_path_rate=0.1))
recipe = dict(drop_path=0.1, top1=81.1)
