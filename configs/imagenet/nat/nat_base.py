"""NAT-Base on ImageNet-1k: 84.3 % top-1 published.

zoo train imagenet/nat/nat_base

Drop path: nat.py:375. Accuracy: NAT.md.
"""

_base_ = './_nat.py'

model = dict(backbone=dict(name='nat_base', drop_path_rate=0.5))
recipe = dict(drop_path=0.5, top1=84.3)
