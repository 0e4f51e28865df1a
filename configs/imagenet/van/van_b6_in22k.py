"""VAN-B6 on ImageNet-22k, to be fine-tuned by imagenet/van/van_b6_in22k_ft_224 or _384.

zoo train imagenet/van/van_b6_in22k

Images are in data/imagenet22k/{train,val}/CLASS/*.
"""

_base_ = './_van_in22k.py'

model = dict(backbone=dict(name='van_b6'))
