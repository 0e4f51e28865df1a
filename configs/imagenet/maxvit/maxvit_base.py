"""MaxViT-B on ImageNet-1k: 84.95 % top-1 published.

zoo train imagenet/maxvit/maxvit_base

Drop path, 1 - survival: hp/vision_i1k.py:73. Accuracy: README.md.
"""

_base_ = './_maxvit.py'

model = dict(backbone=dict(name='maxvit_base', drop_path_rate=0.4))
recipe = dict(drop_path=0.4, top1=84.95)
