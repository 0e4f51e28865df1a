"""SHViT-S3 on ImageNet-1k: 77.4 % top-1 published.

zoo train imagenet/shvit/shvit_s3

Weight decay and accuracy: README.md.
"""

_base_ = './_shvit.py'

model = dict(backbone=dict(name='shvit_s3'))
optim_wrapper = dict(optimizer=dict(weight_decay=0.035))
recipe = dict(top1=77.4, weight_decay=0.035)
