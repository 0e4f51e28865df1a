"""CrossFormer and CrossFormer++ on ImageNet-1k, as cheerss/CrossFormer (7952010) trains them: config.py, main.py.

- 8 x 128 images (README, Training); lr 5e-4, warm-up from 5e-7 and minimum 5e-6, all x batch/512 (main.py:364-366).
- Cosine by optimizer step, 20 warm-up epochs within the 300. fp16 autocast, gradient norm 5 (config.py:107).
- Exempt from decay: vectors and biases; the keyword relative_position_bias_table matches no parameter (optimizer.py).
"""

_base_ = ['../../_base_/imagenet.py', '../../_base_/deit.py', '../../_base_/runtime.py']

scale_lr = dict(base_batch=512, scaled=('lr', 'warmup_lr', 'min_lr'))
optim_wrapper = dict(
    type='AutocastOptimWrapper',
    dtype='float16',
    optimizer=dict(lr=5e-4),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = dict(warmup_epochs=20, warmup_lr=5e-7, min_lr=5e-6, per_step=True)
recipe = dict(clip_grad=dict(max_norm=5.0), precision='float16')
