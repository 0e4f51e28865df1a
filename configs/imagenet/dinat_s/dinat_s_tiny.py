"""DiNAT_s-Tiny on ImageNet-1k: 81.8 % top-1 published.

zoo train imagenet/dinat_s/dinat_s_tiny

Drop path: dinats.py:325-379. Accuracy: DiNAT.md.
"""

_base_ = '../nat/_nat.py'

model = dict(backbone=dict(name='dinat_s_tiny', drop_path_rate=0.2))
recipe = dict(drop_path=0.2, top1=81.8)
