"""NAT-Mini on ImageNet-1k: 81.8 % top-1 published.

zoo train imagenet/nat/nat_mini

Drop path: nat.py:320. Accuracy: NAT.md.
"""

_base_ = './_nat.py'

model = dict(backbone=dict(name='nat_mini', drop_path_rate=0.2))
recipe = dict(drop_path=0.2, top1=81.8)
