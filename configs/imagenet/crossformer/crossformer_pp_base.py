"""CrossFormer++-B on ImageNet-1k: 84.2 % top-1 published.

zoo train imagenet/crossformer/crossformer_pp_base

Drop path: configs/crossformer_pp/base_*.yaml. Accuracy: README.md.
"""

_base_ = './_crossformer.py'

model = dict(backbone=dict(name='crossformer_pp_base', drop_path_rate=0.3))
recipe = dict(drop_path=0.3, top1=84.2)
