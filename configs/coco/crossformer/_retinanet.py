"""CrossFormer in RetinaNet 1x, as cheerss/CrossFormer (7952010) trains it: detection/configs.

Weight decay 1e-4 on all. The maps are each stage's, without a norm of their own.
"""

_base_ = '../../_base_/retinanet.py'

optim_wrapper = dict(optimizer=dict(weight_decay=1e-4))
recipe = dict(weight_decay=1e-4)
