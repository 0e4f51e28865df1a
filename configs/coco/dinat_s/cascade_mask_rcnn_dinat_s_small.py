"""DiNAT_s-Small, Cascade Mask R-CNN 3x: 52.3 box AP, 45.2 mask AP published.

zoo train coco/dinat_s/cascade_mask_rcnn_dinat_s_small --cfg-options model.backbone.checkpoint=FILE

detection/configs/dinat_s/cascade_mask_rcnn_dinat_s_small.*.py. Figures: detection/DiNAT.md.
"""

_base_ = './_cascade.py'

model = dict(
    backbone=dict(
        name='dinat_s_small',
        drop_path_rate=0.5,
        dilations=(28, 14, [1, 3, 1, 5, 1, 7, 1, 3, 1, 5, 1, 7, 1, 3, 1, 5, 1, 7], 3),
    )
)
recipe = dict(drop_path=0.5)
