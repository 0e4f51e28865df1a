"""DiNAT-Base on ImageNet-1k: 84.4 % top-1 published.

zoo train imagenet/dinat/dinat_base

Drop path: dinat.py:111. Accuracy: DiNAT.md.
"""

_base_ = '../nat/_nat.py'

model = dict(backbone=dict(name='dinat_base', drop_path_rate=0.5))
recipe = dict(drop_path=0.5, top1=84.4)
