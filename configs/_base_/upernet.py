"""UPerNet with an auxiliary FCN head: 160k steps of 16 images, AdamW at 6e-5 that falls linearly after a warm-up."""

_base_ = ['./ade20k.py', './runtime.py']

total_batch = 16
sync_bn = True
model = dict(
    type='Segmentor',
    head=dict(type='UPerHead', num_classes=150, channels=512),
    auxiliary=[dict(type='FCNHead', level=2, channels=256, weight=0.4)],
    test=dict(resize=(2048, 512)),
)
optim_wrapper = dict(
    type='OptimWrapper',
    constructor='DenseParamGroups',
    optimizer=dict(type='AdamW', lr=6e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01),
)
param_scheduler = dict(type='DenseLR', by_epoch=False, sched='poly', warmup_steps=1500, warmup_start=1e-6)
train_cfg = dict(type='TrainLoop', max_steps=160_000, val_interval=16_000)
default_hooks = dict(checkpoint=dict(interval_iters=16_000, best='mIoU'))
custom_hooks = [dict(type='DensePictures')]
recipe = dict(total_batch=16, lr=6e-5, steps=160_000, weight_decay=0.01, clip_grad={}, precision='float32')
