"""DiNAT-Mini on ImageNet-1k: 81.8 % top-1 published.

zoo train imagenet/dinat/dinat_mini

Drop path: dinat.py:39. Accuracy: DiNAT.md.
"""

_base_ = '../nat/_nat.py'

model = dict(backbone=dict(name='dinat_mini', drop_path_rate=0.2))
recipe = dict(drop_path=0.2, top1=81.8)
