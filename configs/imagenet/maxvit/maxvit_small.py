"""MaxViT-S on ImageNet-1k: 84.45 % top-1 published.

zoo train imagenet/maxvit/maxvit_small

Drop path, 1 - survival: hp/vision_i1k.py:66. Accuracy: README.md.
"""

_base_ = './_maxvit.py'

model = dict(backbone=dict(name='maxvit_small', drop_path_rate=0.3))
recipe = dict(drop_path=0.3, top1=84.45)
