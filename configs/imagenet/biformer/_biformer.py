"""BiFormer on ImageNet-1k, as rayleizhu/BiFormer (1697bbb) trains it: configs/train_args.yaml, main.py, README.md.

- 8 x 128 images (README, Training), lr 5e-4 x batch/512, warm-up from 1e-6 and minimum 1e-5 not scaled (main.py:338).
- Cosine by epoch, 5 warm-up epochs within the 300; its cooldown of 10 is never run (main.py:417).
- fp16 autocast (engine.py:41), no clipping, repeated augmentation x3.
- An average of decay 0.99996 is kept and saved, but the published accuracy is of the raw weights (main.py:323,478).
"""

_base_ = ['../../_base_/imagenet.py', '../../_base_/deit.py', '../../_base_/runtime.py']

scale_lr = dict(base_batch=512, scaled=('lr',))
train_dataloader = dict(sampler=dict(repeats=3))
optim_wrapper = dict(type='AutocastOptimWrapper', dtype='float16', optimizer=dict(lr=5e-4))
custom_hooks = [dict(type='EMA', decay=0.99996, validate='raw')]
recipe = dict(ema=0.99996, precision='float16')
