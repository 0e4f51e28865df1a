"""DiNAT-Base, Cascade Mask R-CNN 3x: 53.4 box AP, 46.2 mask AP published.

zoo train coco/dinat/cascade_mask_rcnn_dinat_base --cfg-options model.backbone.checkpoint=FILE

detection/configs/dinat/cascade_mask_rcnn_dinat_base.*.py. Figures: detection/DiNAT.md.
"""

_base_ = './_cascade.py'

model = dict(
    backbone=dict(
        name='dinat_base',
        drop_path_rate=0.6,
        dilations=(28, [1, 7, 1, 14], [1, 3, 1, 5, 1, 7, 1, 3, 1, 5, 1, 7, 1, 3, 1, 5, 1, 7], 3),
    )
)
optim_wrapper = dict(optimizer=dict(lr=7.5e-05))
recipe = dict(drop_path=0.6, lr=7.5e-05)
