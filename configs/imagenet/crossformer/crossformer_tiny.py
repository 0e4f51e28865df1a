"""CrossFormer-T on ImageNet-1k: 81.5 % top-1 published.

zoo train imagenet/crossformer/crossformer_tiny

Drop path: configs/crossformer/tiny_patch4_group7_224.yaml:4. Accuracy: README.md.
"""

_base_ = './_crossformer.py'

model = dict(backbone=dict(name='crossformer_tiny', drop_path_rate=0.1))
recipe = dict(drop_path=0.1, top1=81.5)
