"""CrossFormer-L on ImageNet-1k: 84.0 % top-1 published.

zoo train imagenet/crossformer/crossformer_large

Drop path: configs/crossformer/large_patch4_group7_224.yaml:4. Accuracy: README.md.
"""

_base_ = './_crossformer.py'

model = dict(backbone=dict(name='crossformer_large', drop_path_rate=0.5))
recipe = dict(drop_path=0.5, top1=84.0)
