"""ADE20K's 150 classes in data/ADEChallengeData2016: crops of 512 of images resized by 0.5 to 2; tests whole."""

train_dataloader = dict(
    dataset=dict(
        type='ADE20K',
        root='data/ADEChallengeData2016',
        split='training',
        transform=[
            dict(type='RandomResizeRatio', scale=(2048, 512), ratio=(0.5, 2.0)),
            dict(type='RandomCropMax', size=512, cat_max_ratio=0.75),
            dict(type='RandomHorizontalFlip', p=0.5),
            dict(type='PhotometricDistortion'),
            dict(type='PadTo', size=512),
        ],
    ),
    sampler=dict(type='ShuffledStream'),
    collate_fn=dict(type='collate'),
    batch_size=4,  # what a process holds at most
    num_workers=4,
    drop_last=True,
)
val_dataloader = dict(
    dataset=dict(type='ADE20K', root='data/ADEChallengeData2016', split='validation'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='collate'),
    batch_size=1,
    num_workers=4,
)
val_cfg = {}
val_evaluator = dict(type='MeanIoU')
