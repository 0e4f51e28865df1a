"""SHViT on ImageNet-1k, as ysj9909/SHViT (6a729cc) trains it: main.py, engine.py and the commands of its README.

- 8 x 256 images, lr 1e-3 x batch/512 = 4e-3; warm-up from 1e-6 and minimum 1e-5 not scaled (main.py:75-85,312).
- Cosine by epoch, 5 warm-up epochs within the 300; repeated augmentation x3 (main.py:112).
- fp32 (autocast is commented out, engine.py:46), adaptive clipping 0.02, no drop path, a weight decay for each variant.
- An average of decay 0.99996 is kept and saved, but the published accuracy is of the raw weights (main.py:293,407).
"""

_base_ = ['../../_base_/imagenet.py', '../../_base_/deit.py', '../../_base_/runtime.py']

total_batch = 2048
scale_lr = dict(base_batch=512, scaled=('lr',))
train_dataloader = dict(batch_size=256, sampler=dict(repeats=3))
optim_wrapper = dict(clip_grad=dict(type='agc', clip_factor=0.02))
custom_hooks = [dict(type='EMA', decay=0.99996, validate='raw')]
recipe = dict(
    total_batch=2048,
    lr=4e-3,
    drop_path=0.0,
    clip_grad=dict(type='agc', clip_factor=0.02),
    ema=0.99996,
)
