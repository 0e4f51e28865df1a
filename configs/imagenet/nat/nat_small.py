"""NAT-Small on ImageNet-1k: 83.7 % top-1 published.

zoo train imagenet/nat/nat_small

Drop path: nat.py:356. Accuracy: NAT.md.
"""

_base_ = './_nat.py'

model = dict(backbone=dict(name='nat_small', drop_path_rate=0.3))
recipe = dict(drop_path=0.3, top1=83.7)
