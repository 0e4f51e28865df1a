"""BiFormer-T on ImageNet-1k: 81.4 % top-1 published.

zoo train imagenet/biformer/biformer_tiny

Drop path: issue #32 of the code. Accuracy: its README; the authors' log ends at 81.37.
"""

_base_ = './_biformer.py'

model = dict(backbone=dict(name='biformer_tiny', drop_path_rate=0.1))
recipe = dict(drop_path=0.1, top1=81.4)
