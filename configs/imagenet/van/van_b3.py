"""VAN-B3 on ImageNet-1k: 83.9 % top-1 published.

zoo train imagenet/van/van_b3

Drop path: train.sh:2. Accuracy: README.md.
"""

_base_ = './_van.py'

model = dict(backbone=dict(name='van_b3', drop_path_rate=0.2))
recipe = dict(drop_path=0.2, top1=83.9)
