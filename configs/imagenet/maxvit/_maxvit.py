"""MaxViT on ImageNet-1k, as google-research/maxvit (70a4707) trains it: maxvit/models/hp/vision_i1k.py, vision.py.

- 4096 images (on TPUs), lr 3e-3 absolute, minimum 1e-5, cosine by step, 10,000 warm-up steps (:42-50). 300 epochs.
- Mixup 0.8 without CutMix (:25-26), RandAugment of 2 layers and magnitude 15 (:22-24), no erasing, no repetition.
- bfloat16, gradient norm 1.0, an average of decay 0.9999, which the published accuracy is of (:54-55).
- Relative position biases are exempt from decay (:53). Test crops are 1/(1 + 32/size) of the side (models/utils.py:25).
- Not stated: AdamW's betas and eps, the rate the warm-up begins at, and whether the cosine begins with the warm-up;
  operations and probabilities of RandAugment are timm's.
"""

_base_ = ['../../_base_/imagenet.py', '../../_base_/deit.py', '../../_base_/runtime.py']

total_batch = 4096
model = dict(
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    mixup=dict(cutmix_alpha=0.0),
    random_erasing=None,
)
train_dataloader = dict(
    dataset=dict(transform=dict(auto_augment='rand-m15-n2-mmax15', color_jitter=0.0)), batch_size=64
)
optim_wrapper = dict(
    type='AutocastOptimWrapper',
    dtype='bfloat16',
    optimizer=dict(lr=3e-3),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = dict(
    _delete_=True,
    type='TimmLR',
    convert_to_iter_based=True,
    sched='cosine',
    per_step=True,
    warmup_steps=10_000,
    warmup_lr=0.0,
    min_lr=1e-5,
)
custom_hooks = [dict(type='EMA', decay=0.9999)]
recipe = dict(
    total_batch=4096,
    lr=3e-3,
    warmup_lr=0.0,
    clip_grad=dict(max_norm=1.0),
    ema=0.9999,
    evaluates='average',
    precision='bfloat16',
    unknown=(
        'optim_wrapper.optimizer.betas',
        'optim_wrapper.optimizer.eps',
        'param_scheduler.warmup_lr',
        'param_scheduler.warmup_prefix',
        'train_dataloader.dataset.transform.auto_augment',
        'model.mean',
        'model.std',
    ),
)
