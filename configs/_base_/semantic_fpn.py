"""Semantic FPN: 80k steps. Its published schedules differ: each family's part says what it has."""

_base_ = ['./ade20k.py', './runtime.py']

total_batch = 32
sync_bn = True
model = dict(
    type='Segmentor',
    neck=dict(type='FPN', out_channels=256),
    head=dict(type='SemanticFPNHead', num_classes=150, channels=128),
    test=dict(resize=(2048, 512), divisor=32),
)
optim_wrapper = dict(
    type='OptimWrapper',
    constructor='DenseParamGroups',
    optimizer=dict(type='AdamW', lr=2e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4),
)
param_scheduler = dict(type='DenseLR', by_epoch=False, sched='poly', power=0.9)
train_cfg = dict(type='TrainLoop', max_steps=80_000, val_interval=8_000)
default_hooks = dict(checkpoint=dict(interval_iters=8_000, best='mIoU'))
custom_hooks = [dict(type='DensePictures')]
recipe = dict(total_batch=32, lr=2e-4, steps=80_000, weight_decay=1e-4, clip_grad={}, precision='float32')
