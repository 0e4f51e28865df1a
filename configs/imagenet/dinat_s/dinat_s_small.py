"""DiNAT_s-Small on ImageNet-1k: 83.5 % top-1 published.

zoo train imagenet/dinat_s/dinat_s_small

Drop path: dinats.py:325-379. Accuracy: DiNAT.md.
"""

_base_ = '../nat/_nat.py'

model = dict(backbone=dict(name='dinat_s_small', drop_path_rate=0.3))
recipe = dict(drop_path=0.3, top1=83.5)
