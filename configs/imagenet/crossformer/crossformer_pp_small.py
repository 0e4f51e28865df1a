"""CrossFormer++-S on ImageNet-1k: 83.2 % top-1 published.

zoo train imagenet/crossformer/crossformer_pp_small

Drop path: configs/crossformer_pp/small_*.yaml. Accuracy: README.md.
"""

_base_ = './_crossformer.py'

model = dict(backbone=dict(name='crossformer_pp_small', drop_path_rate=0.2))
recipe = dict(drop_path=0.2, top1=83.2)
