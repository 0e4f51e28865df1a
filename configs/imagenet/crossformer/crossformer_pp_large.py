"""CrossFormer++-L on ImageNet-1k: 84.7 % top-1 published.

zoo train imagenet/crossformer/crossformer_pp_large

Drop path: configs/crossformer_pp/large_*.yaml. Accuracy: README.md.
"""

_base_ = './_crossformer.py'

model = dict(backbone=dict(name='crossformer_pp_large', drop_path_rate=0.5))
recipe = dict(drop_path=0.5, top1=84.7)
