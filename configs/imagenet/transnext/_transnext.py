"""TransNeXt on ImageNet-1k, as DaiShiResearch/TransNeXt (c8a9974) trains it: classification/main.py and configs/.

- 1024 images, lr 1e-3 absolute (the scaling is commented out, main.py:342), minimum 1e-5, warm-up from 1e-6.
- Cosine by epoch, 5 warm-up epochs within the 300; repeated augmentation x3 (main.py:139).
- fp16 autocast (engine.py:39), gradient norm 1 (configs/*:4), no average (README).
- Exempt from decay: vectors, biases, and names with query_embedding, relative_pos_bias_local, cpb or temperature
  (transnext.py:294), which the backbone's no_weight_decay() names.
"""

_base_ = ['../../_base_/imagenet.py', '../../_base_/deit.py', '../../_base_/runtime.py']

train_dataloader = dict(sampler=dict(repeats=3))
optim_wrapper = dict(type='AutocastOptimWrapper', dtype='float16', clip_grad=dict(max_norm=1.0))
recipe = dict(clip_grad=dict(max_norm=1.0), precision='float16')
