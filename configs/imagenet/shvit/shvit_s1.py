"""SHViT-S1 on ImageNet-1k: 72.8 % top-1 published.

zoo train imagenet/shvit/shvit_s1

Weight decay and accuracy: README.md.
"""

_base_ = './_shvit.py'

model = dict(backbone=dict(name='shvit_s1'))
optim_wrapper = dict(optimizer=dict(weight_decay=0.025))
recipe = dict(top1=72.8, weight_decay=0.025)
