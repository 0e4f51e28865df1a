"""scikit-learn's digits at 64x64, written to data/digits when first used; in training shifted."""

resize = dict(type='Resize', size=64)
shift = dict(type='RandomAffine', degrees=0, translate=(0.125, 0.125), interpolation=2)  # bilinear; up to a pixel of 8
to_tensor = dict(type='PILToTensor')
train_dataloader = dict(
    dataset=dict(
        type='Digits',
        root='data/digits',
        split='train',
        transform=[resize, shift, to_tensor],
    ),
    sampler=dict(type='ShuffledStream'),
    collate_fn=dict(type='default_collate'),
    batch_size=25,
    num_workers=0,
    drop_last=True,
)
val_dataloader = dict(
    dataset=dict(type='Digits', root='data/digits', split='test', transform=[resize, to_tensor]),
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='default_collate'),
    batch_size=100,
    num_workers=0,
)
