"""CrossFormer in UPerNet, as cheerss/CrossFormer (7952010) trains it: segmentation/configs.

Norms aren't decayed. The number of GPUs is not stated: a batch of 16, as others have.
"""

_base_ = '../../_base_/upernet.py'

optim_wrapper = dict(paramwise_cfg=dict(no_decay=('norm',)))
