"""SHViT-S2 on ImageNet-1k: 75.2 % top-1 published.

zoo train imagenet/shvit/shvit_s2

Weight decay and accuracy: README.md.
"""

_base_ = './_shvit.py'

model = dict(backbone=dict(name='shvit_s2'))
optim_wrapper = dict(optimizer=dict(weight_decay=0.032))
recipe = dict(top1=75.2, weight_decay=0.032)
