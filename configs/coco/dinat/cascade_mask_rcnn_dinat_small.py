"""DiNAT-Small, Cascade Mask R-CNN 3x: 52.9 box AP, 45.8 mask AP published.

zoo train coco/dinat/cascade_mask_rcnn_dinat_small --cfg-options model.backbone.checkpoint=FILE

detection/configs/dinat/cascade_mask_rcnn_dinat_small.*.py. Figures: detection/DiNAT.md.
"""

_base_ = './_cascade.py'

model = dict(
    backbone=dict(
        name='dinat_small',
        drop_path_rate=0.5,
        dilations=(28, [1, 7, 1, 14], [1, 3, 1, 5, 1, 7, 1, 3, 1, 5, 1, 7, 1, 3, 1, 5, 1, 7], 3),
    )
)
recipe = dict(drop_path=0.5)
