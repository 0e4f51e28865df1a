"""CrossFormer in Semantic FPN, as cheerss/CrossFormer (7952010) trains it: segmentation/configs.

80k steps of 16 images, AdamW at 1e-4, a polynomial of power 0.9 to zero, no warm-up.
"""

_base_ = '../../_base_/semantic_fpn.py'

total_batch = 16
optim_wrapper = dict(optimizer=dict(lr=1e-4))
recipe = dict(total_batch=16, lr=1e-4)
