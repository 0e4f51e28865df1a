"""SHViT-S4, Mask R-CNN 1x: 39.0 box AP, 35.9 mask AP published.

zoo train coco/shvit/mask_rcnn_shvit_s4 --cfg-options model.backbone.checkpoint=FILE

ysj9909/SHViT (6a729cc), downstream/configs/mask_rcnn_shvit_s4_fpn_1x_coco.py. Maps of strides 16, 32 and 64, to which
transposed convolutions add two finer levels, of strides 8 and 4 (efficientvit_fpn.py). BatchNorms keep their
statistics.
"""

_base_ = '../../_base_/mask_rcnn.py'

model = dict(
    backbone=dict(name='shvit_s4'),
    neck=dict(strides=(4, 8, 16, 32, 64), extra_levels=0),
    frozen_norms=True,
)
recipe = dict(drop_path=0.0)
