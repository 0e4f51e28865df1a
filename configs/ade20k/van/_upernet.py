"""VAN in UPerNet, as Visual-Attention-Network/VAN-Segmentation (8285fc7) trains it: configs/upernet.

Norms aren't decayed. BatchNorms are synchronized. The published figures are of several scales and mirrored images:
model.test.scales=[0.5,0.75,1.0,1.25,1.5,1.75] and model.test.flip=True, for `zoo measure`.
"""

_base_ = '../../_base_/upernet.py'

optim_wrapper = dict(paramwise_cfg=dict(no_decay=('norm',)))
