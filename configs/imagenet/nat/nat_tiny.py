"""NAT-Tiny on ImageNet-1k: 83.2 % top-1 published.

zoo train imagenet/nat/nat_tiny

Drop path: nat.py:338. Accuracy: NAT.md.
"""

_base_ = './_nat.py'

model = dict(backbone=dict(name='nat_tiny', drop_path_rate=0.2))
recipe = dict(drop_path=0.2, top1=83.2)
