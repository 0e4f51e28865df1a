"""MaxViT-L on ImageNet-1k: 85.17 % top-1 published.

zoo train imagenet/maxvit/maxvit_large

Drop path, 1 - survival: hp/vision_i1k.py:80. Accuracy: README.md.
"""

_base_ = './_maxvit.py'

model = dict(backbone=dict(name='maxvit_large', drop_path_rate=0.6))
recipe = dict(drop_path=0.6, top1=85.17)
