"""BiFormer in RetinaNet 1x, as rayleizhu/BiFormer (1697bbb) trains it: object_detection/configs/coco, models_mm.

As in Mask R-CNN, but with weight decay 1e-4 on all, norms too, and a loss scale of 512.
"""

_base_ = '../../_base_/retinanet.py'

model = dict(backbone=dict(n_win=16, output_norms=1e-6), frozen_norms=True)
optim_wrapper = dict(type='AutocastOptimWrapper', dtype='float16', loss_scale=512.0, optimizer=dict(weight_decay=1e-4))
recipe = dict(weight_decay=1e-4, precision='float16')
