"""BiFormer in UPerNet, as rayleizhu/BiFormer (1697bbb) trains it: semantic_segmentation/configs/ade20k.

Regions of an 8th of a side, a LayerNorm on each map, synchronized BatchNorms; norms aren't decayed; fp16. The schedule,
which the repository lacks (_base_/schedules/schedule_160k.py), is mmsegmentation's.
"""

_base_ = '../../_base_/upernet.py'

model = dict(backbone=dict(n_win=8, output_norms=1e-6))
optim_wrapper = dict(
    type='AutocastOptimWrapper', dtype='float16', loss_scale=512.0, paramwise_cfg=dict(no_decay=('norm',))
)
recipe = dict(precision='float16')
