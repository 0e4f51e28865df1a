"""VAN from ImageNet-22k to 1k, as LGYoung/VAN-Classification (b3e3188): ImageNet-22k/finetune.sh, finetune_384.sh.

- 512 images, lr 5e-5 absolute, minimum 1e-6, 30 epochs without warm-up, weight decay 1e-8.
- No mixup, no CutMix; the new classifier's weights are scaled by 0.001. Crop 0.875, the ImageNet mean and std.
- Not stated: the accuracy, and whether the rate changes by epoch.
"""

_base_ = ['../../_base_/imagenet.py', '../../_base_/deit.py', '../../_base_/runtime.py']

total_batch = 512
model = dict(mixup=None, classifier_scale=1e-3, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
train_dataloader = dict(batch_size=32)
optim_wrapper = dict(optimizer=dict(lr=5e-5, weight_decay=1e-8))
param_scheduler = dict(warmup_epochs=0, min_lr=1e-6)
train_cfg = dict(max_epochs=30)
recipe = dict(
    total_batch=512,
    lr=5e-5,
    warmup_lr=None,
    min_lr=1e-6,
    epochs=30,
    weight_decay=1e-8,
    unknown=('param_scheduler.per_step',),
)
