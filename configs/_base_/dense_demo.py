"""What the demonstrations share: 2,000 scenes of digits to train on, written to data/digit_scenes, and 200 to test on.

The digits are handwritten ones, of other writers in the tests; the scenes that they are pasted into are drawn.
"""

total_batch = 8
train_dataloader = dict(
    sampler=dict(type='ShuffledStream'),
    collate_fn=dict(type='collate'),
    batch_size=8,
    num_workers=0,
    drop_last=True,
)
val_dataloader = dict(
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='collate'),
    batch_size=8,
    num_workers=0,
)
val_cfg = {}
optim_wrapper = dict(
    type='OptimWrapper',
    constructor='DenseParamGroups',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05, fused=True),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = dict(type='DenseLR', by_epoch=False, sched='cosine', warmup_steps=50, warmup_start=0.01)
train_cfg = dict(type='TrainLoop', max_epochs=4, val_interval=4)
custom_hooks = [dict(type='DensePictures')]
