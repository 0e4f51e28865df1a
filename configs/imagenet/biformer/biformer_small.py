"""BiFormer-S on ImageNet-1k: 83.8 % top-1 published.

zoo train imagenet/biformer/biformer_small

Drop path and accuracy: README.md, Training and Evaluation.
"""

_base_ = './_biformer.py'

model = dict(backbone=dict(name='biformer_small', drop_path_rate=0.15))
recipe = dict(drop_path=0.15, top1=83.8)
