"""TransNeXt-Micro with aggregated attention in all stages on ImageNet-1k: 82.6 % top-1 published.

zoo train imagenet/transnext/transnext_micro_aaaa

Drop path and size, 256 pixels: configs/transnext_micro_AAAA_256.py:3-6. Accuracy: README.md.
"""

_base_ = './_transnext.py'

model = dict(backbone=dict(name='transnext_micro_aaaa', drop_path_rate=0.15))
train_dataloader = dict(dataset=dict(transform=dict(input_size=256)))
val_dataloader = dict(dataset=dict(transform=dict(input_size=256)))
recipe = dict(drop_path=0.15, top1=82.6, image_size=256)
