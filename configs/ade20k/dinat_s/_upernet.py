"""DiNAT_s in UPerNet, as SHI-Labs/Neighborhood-Attention-Transformer (d334f5b) trains it.

segmentation/configs/dinat_s. A LayerNorm on each map; position biases and norms aren't decayed; fp16.

Every second block is dilated, by numbers that rise to what a map of 512 pixels holds.
"""

_base_ = '../../_base_/upernet.py'

model = dict(backbone=dict(output_norms=1e-5))
optim_wrapper = dict(type='AutocastOptimWrapper', dtype='float16', paramwise_cfg=dict(no_decay=('rpb', 'norm')))
recipe = dict(precision='float16')
