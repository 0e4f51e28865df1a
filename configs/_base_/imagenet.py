"""ImageNet-1k as folders data/imagenet/{train,val}/CLASS/*, at 224 pixels, with DeiT's augmentation.

Elsewhere or otherwise: train_dataloader.dataset.root, .reader, .split, and the same of val_dataloader.
"""

train_dataloader = dict(
    dataset=dict(
        type='LabelledImages',
        root='data/imagenet',
        split='train',
        transform=dict(
            type='timm_transform',
            input_size=224,
            is_training=True,
            auto_augment='rand-m9-mstd0.5-inc1',
            interpolation='bicubic',
            mean=(0.485, 0.456, 0.406),  # RandAugment fills with it
        ),
    ),
    sampler=dict(type='ShuffledStream'),
    collate_fn=dict(type='default_collate'),
    batch_size=128,  # what a process holds at most
    num_workers=8,
    pin_memory=True,
    drop_last=True,
)
val_dataloader = dict(
    dataset=dict(
        type='LabelledImages',
        root='data/imagenet',
        split='val',
        transform=dict(
            type='timm_transform',
            input_size=224,
            is_training=False,
            interpolation='bicubic',
            crop_pct=0.875,
            crop_mode='center',
        ),
    ),
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='default_collate'),
    batch_size=125,
    num_workers=8,
    pin_memory=True,
)
val_cfg = {}
val_evaluator = dict(type='TopK')
