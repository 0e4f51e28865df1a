"""CrossFormer-S on ImageNet-1k: 82.5 % top-1 published.

zoo train imagenet/crossformer/crossformer_small

Drop path: configs/crossformer/small_patch4_group7_224.yaml:4. Accuracy: README.md.
"""

_base_ = './_crossformer.py'

model = dict(backbone=dict(name='crossformer_small', drop_path_rate=0.2))
recipe = dict(drop_path=0.2, top1=82.5)
