"""DiNAT-Small on ImageNet-1k: 83.8 % top-1 published.

zoo train imagenet/dinat/dinat_small

Drop path: dinat.py:87. Accuracy: DiNAT.md.
"""

_base_ = '../nat/_nat.py'

model = dict(backbone=dict(name='dinat_small', drop_path_rate=0.3))
recipe = dict(drop_path=0.3, top1=83.8)
