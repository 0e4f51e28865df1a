"""SHViT-S4, RetinaNet 1x: 38.8 box AP published.

zoo train coco/shvit/retinanet_shvit_s4 --cfg-options model.backbone.checkpoint=FILE

ysj9909/SHViT (6a729cc), downstream/configs/retinanet_shvit_s4_fpn_1x_coco.py. Maps of strides 16, 32 and 64, to which
transposed convolutions add one finer level, of stride 8 (efficientvit_fpn.py). BatchNorms keep their statistics.
"""

_base_ = '../../_base_/retinanet.py'

model = dict(
    backbone=dict(name='shvit_s4', out_indices=None),
    neck=dict(strides=(8, 16, 32, 64, 128), extra_levels=0),
    frozen_norms=True,
)
recipe = dict(drop_path=0.0)
