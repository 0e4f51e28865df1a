"""DiNAT_s-Base on ImageNet-1k: 83.8 % top-1 published.

zoo train imagenet/dinat_s/dinat_s_base

Drop path: dinats.py:325-379. Accuracy: DiNAT.md.
"""

_base_ = '../nat/_nat.py'

model = dict(backbone=dict(name='dinat_s_base', drop_path_rate=0.5))
recipe = dict(drop_path=0.5, top1=83.8)
