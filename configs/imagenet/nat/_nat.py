"""NAT, DiNAT and DiNAT_s on ImageNet-1k, as SHI-Labs/Neighborhood-Attention-Transformer (d334f5b) trains them.

classification/configs/*.yml, train.py; the drop path of a variant is in its factory (nat.py, dinat.py, dinats.py).

- 8 x 128 images, lr 1e-3 absolute, minimum 5e-6; cosine by optimizer step, 20 warm-up epochs from 1e-6 (yml:2-11).
- 300 epochs and timm's cooldown of 10 at the minimum: 310 (yml:5-6, train.py:938).
- The relative position biases are decayed: timm reads no_weight_decay, the model has only ..._keywords (nat.py:298).
- Training crops are resized by bilinear or bicubic at random (train.py:254); fp16 autocast, gradient norm 5.
"""

_base_ = ['../../_base_/imagenet.py', '../../_base_/deit.py', '../../_base_/runtime.py']

train_dataloader = dict(dataset=dict(transform=dict(interpolation='random')))
optim_wrapper = dict(
    type='AutocastOptimWrapper',
    dtype='float16',
    clip_grad=dict(max_norm=5.0),
    paramwise_cfg=dict(decay=['*.rpb']),
)
param_scheduler = dict(warmup_epochs=20, min_lr=5e-6, cooldown_epochs=10, per_step=True)
train_cfg = dict(max_epochs=310)
recipe = dict(min_lr=5e-6, epochs=310, clip_grad=dict(max_norm=5.0), precision='float16')
