"""DiNAT_s-Base, Cascade Mask R-CNN 3x: 52.6 box AP, 45.3 mask AP published.

zoo train coco/dinat_s/cascade_mask_rcnn_dinat_s_base --cfg-options model.backbone.checkpoint=FILE

detection/configs/dinat_s/cascade_mask_rcnn_dinat_s_base.*.py. Figures: detection/DiNAT.md.
"""

_base_ = './_cascade.py'

model = dict(
    backbone=dict(
        name='dinat_s_base',
        drop_path_rate=0.6,
        dilations=(28, 14, [1, 3, 1, 5, 1, 7, 1, 3, 1, 5, 1, 7, 1, 3, 1, 5, 1, 7], 3),
    )
)
optim_wrapper = dict(optimizer=dict(lr=7.5e-05))
recipe = dict(drop_path=0.6, lr=7.5e-05)
