"""scikit-learn's digits at 64x64, written to data/digits when first used. Training images are turned and shifted."""

to_size = [dict(type='Resize', size=64), dict(type='PILToTensor')]
train_dataloader = dict(
    dataset=dict(
        type='Digits',
        root='data/digits',
        split='train',
        transform=[dict(type='RandomAffine', degrees=10, translate=(0.125, 0.125)), *to_size],
    ),
    sampler=dict(type='ShuffledStream'),
    collate_fn=dict(type='default_collate'),
    batch_size=50,
    num_workers=0,
    drop_last=True,
)
val_dataloader = dict(
    dataset=dict(type='Digits', root='data/digits', split='test', transform=to_size),
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='default_collate'),
    batch_size=100,
    num_workers=0,
)
