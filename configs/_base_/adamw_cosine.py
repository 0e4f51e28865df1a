"""AdamW with timm's parameter groups, a linear warm-up of one epoch, then a cosine to zero; top-1 and top-5."""

optim_wrapper = dict(
    type='OptimWrapper',
    constructor='TimmParamGroups',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = dict(type='WarmupCosineLR', warmup=1, convert_to_iter_based=True)
train_cfg = dict(type='TrainLoop', max_epochs=300, val_interval=1)
val_cfg = {}
val_evaluator = dict(type='TopK')
