"""TransNeXt fine-tuned at 384 pixels: classification/configs/finetune/*_384_ft.py and the README's command.

- 8 x 128 images, 5 epochs at a constant 1e-5 (`sched=None`); CutMix is off, mixup stays at 0.8.
- Relative positions are measured by the size of pre-training, 224. Tested on images squashed to the square.
"""

_base_ = './_transnext.py'

model = dict(backbone=dict(pretrained=True, pretrain_size=224), mixup=dict(cutmix_alpha=0.0))
train_dataloader = dict(dataset=dict(transform=dict(input_size=384)))
val_dataloader = dict(dataset=dict(transform=dict(input_size=384, crop_pct=1.0, crop_mode='squash')))
optim_wrapper = dict(optimizer=dict(lr=1e-5))
param_scheduler = dict(_delete_=True, type='TimmLR', convert_to_iter_based=True, sched='constant')
train_cfg = dict(max_epochs=5)
recipe = dict(lr=1e-5, warmup_lr=None, min_lr=1e-5, epochs=5, image_size=384, crop_pct=1.0)
