"""MaxViT fine-tuned at a greater size: google-research/maxvit, maxvit/models/hp/vision_i1k.py:88-141.

- 512 images, 30 epochs at a constant 5e-5 without warm-up, weight decay 1e-8; the rest as from scratch.
- Windows and grid are 1/32 of the side, their bias tables resized; the classifier begins anew (`init_finetune`).
"""

_base_ = './_maxvit.py'

total_batch = 512
model = dict(new_classifier=True)
train_dataloader = dict(batch_size=16)
optim_wrapper = dict(optimizer=dict(lr=5e-5, weight_decay=1e-8))
param_scheduler = dict(_delete_=True, type='TimmLR', convert_to_iter_based=True, sched='constant')
train_cfg = dict(max_epochs=30)
recipe = dict(total_batch=512, lr=5e-5, warmup_lr=None, min_lr=5e-5, epochs=30, weight_decay=1e-8)
