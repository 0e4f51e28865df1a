"""What the detectors share: AdamW at 1e-4 for 12 epochs, the rate falling at the 8th and the 11th ("1x").

A linear warm-up of 500 steps from a thousandth. All is decayed but what `paramwise_cfg` names.
"""

model = dict(type='Detector', neck=dict(type='FPN', out_channels=256, extra_levels=1))
optim_wrapper = dict(
    type='OptimWrapper',
    constructor='DenseParamGroups',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
)
param_scheduler = dict(
    type='DenseLR', by_epoch=False, sched='step', milestones=(8 / 12, 11 / 12), warmup_steps=500, warmup_start=1e-3
)
train_cfg = dict(type='TrainLoop', max_epochs=12, val_interval=1)
custom_hooks = [dict(type='DensePictures')]
recipe = dict(total_batch=16, lr=1e-4, epochs=12, weight_decay=0.05, clip_grad={}, precision='float32')
