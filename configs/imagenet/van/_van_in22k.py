"""VAN pre-trained on ImageNet-22k, as LGYoung/VAN-Classification (b3e3188) does it: ImageNet-22k/train.sh, main.py.

- 64 images x 8 GPUs x 8 machines x 2 accumulated = 8192, lr 4e-3 absolute, minimum 1e-6.
- 90 epochs, 5 of warm-up; drop path 0.1; the ImageNet mean and std here (main.py:151). No average, no clipping, fp32.
- Not stated: the number of classes of its copy, and whether the rate changes by epoch.
"""

_base_ = ['../../_base_/imagenet.py', '../../_base_/deit.py', '../../_base_/runtime.py']

total_batch = 8192
model = dict(
    backbone=dict(num_classes=21841, drop_path_rate=0.1),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
train_dataloader = dict(dataset=dict(root='data/imagenet22k'), batch_size=64)
val_dataloader = dict(dataset=dict(root='data/imagenet22k'))
optim_wrapper = dict(optimizer=dict(lr=4e-3))
param_scheduler = dict(min_lr=1e-6)
train_cfg = dict(max_epochs=90)
recipe = dict(
    total_batch=8192,
    lr=4e-3,
    min_lr=1e-6,
    epochs=90,
    drop_path=0.1,
    unknown=('model.backbone.num_classes', 'param_scheduler.warmup_lr', 'param_scheduler.per_step'),
)
