"""VAN in Semantic FPN, as Visual-Attention-Network/VAN-Segmentation (8285fc7) trains it: configs/sem_fpn.

40k steps of 32 images (80k of 16), AdamW at 2e-4, a polynomial of power 0.9 to zero, no warm-up. BatchNorms are
synchronized. The maps are the model's own, after the norm of each stage.
"""

_base_ = '../../_base_/semantic_fpn.py'

train_cfg = dict(max_steps=40_000, val_interval=4_000)
default_hooks = dict(checkpoint=dict(interval_iters=4_000))
recipe = dict(steps=40_000)
