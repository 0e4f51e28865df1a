"""DiNAT-Tiny on ImageNet-1k: 82.7 % top-1 published.

zoo train imagenet/dinat/dinat_tiny

Drop path: dinat.py:63. Accuracy: DiNAT.md.
"""

_base_ = '../nat/_nat.py'

model = dict(backbone=dict(name='dinat_tiny', drop_path_rate=0.2))
recipe = dict(drop_path=0.2, top1=82.7)
