"""BiFormer in Semantic FPN, as rayleizhu/BiFormer (1697bbb) trains it: semantic_segmentation/configs/ade20k.

- 80k steps of 32 images, AdamW at 2e-4, a cosine down to 1e-8 of it, a warm-up of 1000 steps from a tenth; fp16.
- Regions of an 8th of a side, right and bottom padded to that; a LayerNorm on each map; BatchNorms are synchronized.
"""

_base_ = '../../_base_/semantic_fpn.py'

model = dict(backbone=dict(n_win=8, output_norms=1e-6))
optim_wrapper = dict(type='AutocastOptimWrapper', dtype='float16', loss_scale=512.0)
param_scheduler = dict(sched='cosine', min_ratio=1e-8, warmup_steps=1000, warmup_start=0.1)
recipe = dict(precision='float16')
