"""CrossFormer++-H on ImageNet-1k: 84.9 % top-1 published.

zoo train imagenet/crossformer/crossformer_pp_huge

Drop path: configs/crossformer_pp/huge_*.yaml. Accuracy: README.md. No command is given for this variant.
"""

_base_ = './_crossformer.py'

model = dict(backbone=dict(name='crossformer_pp_huge', drop_path_rate=0.5))
recipe = dict(drop_path=0.5, top1=84.9)
