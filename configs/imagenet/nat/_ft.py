"""DiNAT-Large and DiNAT_s-Large from ImageNet-22k to 1k: classification/configs/dinat_large.yml and its like.

- 64 images a GPU (the number of GPUs is not stated; 512 is of 8), 30 epochs at lr 5e-5: the yml's `sched: linear` is
  none of train.py's branches (train.py:925-985), so that the released code keeps the rate constant.
- No mixup, no CutMix, fp32; smoothing, RandAugment, erasing and clipping as in training from scratch.
"""

_base_ = './_nat.py'

total_batch = 512
model = dict(backbone=dict(drop_path_rate=0.35), mixup=None)
train_dataloader = dict(batch_size=64)
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    constructor='TimmParamGroups',
    optimizer=dict(type='AdamW', lr=5e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4),
    clip_grad=dict(max_norm=5.0),
    paramwise_cfg=dict(decay=['*.rpb']),
)
param_scheduler = dict(_delete_=True, type='TimmLR', convert_to_iter_based=True, sched='constant')
train_cfg = dict(max_epochs=30)
recipe = dict(
    total_batch=512,
    lr=5e-5,
    warmup_lr=None,
    min_lr=5e-5,
    epochs=30,
    weight_decay=1e-4,
    drop_path=0.35,
    precision='float32',
    unknown=('total_batch',),
)
