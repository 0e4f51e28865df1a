"""DiNAT in Mask R-CNN 3x, as SHI-Labs/Neighborhood-Attention-Transformer (d334f5b) trains it.

detection/configs/dinat. 36 epochs, images of many sizes; a LayerNorm on each map; position biases and norms aren't
decayed; fp16.

Every second block of DiNAT is dilated, by numbers that rise to what a map of 800 pixels holds,
28, 14, 7 and 3 in the four stages. Their order is that of the segmentation configs.
"""

_base_ = '../../_base_/mask_rcnn_3x.py'

model = dict(backbone=dict(output_norms=1e-5))
optim_wrapper = dict(type='AutocastOptimWrapper', dtype='float16', paramwise_cfg=dict(no_decay=('rpb', 'norm')))
recipe = dict(precision='float16')
