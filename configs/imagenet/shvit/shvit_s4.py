"""SHViT-S4 on ImageNet-1k: 79.4 % top-1 published.

zoo train imagenet/shvit/shvit_s4

Weight decay, size (256 pixels) and accuracy: README.md.
"""

_base_ = './_shvit.py'

model = dict(backbone=dict(name='shvit_s4'))
train_dataloader = dict(dataset=dict(transform=dict(input_size=256)))
val_dataloader = dict(dataset=dict(transform=dict(input_size=256)))
optim_wrapper = dict(optimizer=dict(weight_decay=0.03))
recipe = dict(top1=79.4, weight_decay=0.03, image_size=256)
