"""TransNeXt-Base fine-tuned on ImageNet-1k at 384 pixels: 86.2 % top-1 published.

zoo train imagenet/transnext/transnext_base_ft_384

Drop path: configs/finetune/transnext_base_384_ft.py. Accuracy: README.md. It begins from the published weights.
"""

_base_ = './_ft_384.py'

model = dict(backbone=dict(name='transnext_base.in1k', drop_path_rate=0.8))
recipe = dict(drop_path=0.8, top1=86.2)
