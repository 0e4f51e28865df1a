"""NAT in Cascade Mask R-CNN 3x, as SHI-Labs/Neighborhood-Attention-Transformer (d334f5b) trains it.

detection/configs/nat. 36 epochs, images of many sizes; a LayerNorm on each map; position biases and norms aren't
decayed; fp16.
"""

_base_ = '../../_base_/cascade_mask_rcnn.py'

model = dict(backbone=dict(output_norms=1e-5))
optim_wrapper = dict(type='AutocastOptimWrapper', dtype='float16', paramwise_cfg=dict(no_decay=('rpb', 'norm')))
recipe = dict(precision='float16')
