"""What the families share with DeiT: AdamW, 300 epochs of cosine, mixup and CutMix, erasing, smoothed labels.

A family's own file says what it changes, and repeats what its source states of these.
"""

total_batch = 1024
model = dict(
    type='ImageClassifier',
    loss=dict(type='cross_entropy', label_smoothing=0.1),
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, switch_prob=0.5, prob=1.0),
    random_erasing=dict(probability=0.25, mode='pixel', max_count=1),
)
optim_wrapper = dict(
    type='OptimWrapper',
    constructor='TimmParamGroups',
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
)
param_scheduler = dict(
    type='TimmLR',
    convert_to_iter_based=True,
    sched='cosine',
    warmup_epochs=5,
    warmup_lr=1e-6,
    min_lr=1e-5,
)
train_cfg = dict(type='TrainLoop', max_epochs=300, val_interval=1)
recipe = dict(
    total_batch=1024,
    lr=1e-3,
    warmup_lr=1e-6,
    min_lr=1e-5,
    epochs=300,
    weight_decay=0.05,
    drop_path=None,
    clip_grad={},
    ema=None,
    evaluates='raw',
    precision='float32',
    image_size=224,
    crop_pct=0.875,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    top1=None,
    unknown=(),
)
