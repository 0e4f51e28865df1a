"""DiNAT-Small, Mask R-CNN 3x: 49.3 box AP, 44.0 mask AP published.

zoo train coco/dinat/mask_rcnn_dinat_small --cfg-options model.backbone.checkpoint=FILE

detection/configs/dinat/mask_rcnn_dinat_small.*.py. Figures: detection/DiNAT.md.
"""

_base_ = './_mask_rcnn.py'

model = dict(
    backbone=dict(
        name='dinat_small',
        drop_path_rate=0.35,
        dilations=(28, [1, 7, 1, 14], [1, 3, 1, 5, 1, 7, 1, 3, 1, 5, 1, 7, 1, 3, 1, 5, 1, 7], 3),
    )
)
recipe = dict(drop_path=0.35)
