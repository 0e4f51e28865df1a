"""VAN on ImageNet-1k, as Visual-Attention-Network/VAN-Classification (e19779b) trains it: train.sh, train.py.

- 8 x 128 images, lr 1e-3 absolute (train.sh:3-4), minimum 1e-6, cosine by epoch with 5 warm-up epochs from 1e-6.
- 300 epochs and timm's cooldown of 10 at the minimum: 310 (train.py:171,475).
- Mean and std 0.5 and crop 0.9, from the cfg of timm 0.4.12's ViT (models/van.py:8,297), in training too.
- Training crops are resized by bilinear or bicubic at random (train.py:227). fp32, no average, no clipping.
"""

_base_ = ['../../_base_/imagenet.py', '../../_base_/deit.py', '../../_base_/runtime.py']

model = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
train_dataloader = dict(dataset=dict(transform=dict(interpolation='random', mean=(0.5, 0.5, 0.5))))
val_dataloader = dict(dataset=dict(transform=dict(crop_pct=0.9)))
param_scheduler = dict(min_lr=1e-6, cooldown_epochs=10)
train_cfg = dict(max_epochs=310)
recipe = dict(min_lr=1e-6, epochs=310, crop_pct=0.9, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
