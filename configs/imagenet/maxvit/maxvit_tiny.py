"""MaxViT-T on ImageNet-1k: 83.62 % top-1 published.

zoo train imagenet/maxvit/maxvit_tiny

Drop path, 1 - survival: hp/vision_i1k.py:59. Accuracy: README.md.
"""

_base_ = './_maxvit.py'

model = dict(backbone=dict(name='maxvit_tiny', drop_path_rate=0.2))
recipe = dict(drop_path=0.2, top1=83.62)
