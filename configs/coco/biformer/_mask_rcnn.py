"""BiFormer in Mask R-CNN 1x, as rayleizhu/BiFormer (1697bbb) trains it: object_detection/configs/coco, models_mm.

- Regions of a 16th of a side, right and bottom padded to that; a LayerNorm on each map; BatchNorms keep their
  statistics. Norms aren't decayed. fp16.
"""

_base_ = '../../_base_/mask_rcnn.py'

model = dict(backbone=dict(n_win=16, output_norms=1e-6), frozen_norms=True)
optim_wrapper = dict(type='AutocastOptimWrapper', dtype='float16', paramwise_cfg=dict(no_decay=('norm',)))
recipe = dict(precision='float16')
