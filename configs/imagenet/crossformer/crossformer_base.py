"""CrossFormer-B on ImageNet-1k: 83.4 % top-1 published.

zoo train imagenet/crossformer/crossformer_base

Drop path: configs/crossformer/base_patch4_group7_224.yaml:4. Accuracy: README.md.
"""

_base_ = './_crossformer.py'

model = dict(backbone=dict(name='crossformer_base', drop_path_rate=0.3))
recipe = dict(drop_path=0.3, top1=83.4)
