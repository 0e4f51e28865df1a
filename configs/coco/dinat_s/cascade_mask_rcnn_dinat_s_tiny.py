"""DiNAT_s-Tiny, Cascade Mask R-CNN 3x: 51.0 box AP, 44.1 mask AP published.

zoo train coco/dinat_s/cascade_mask_rcnn_dinat_s_tiny --cfg-options model.backbone.checkpoint=FILE

detection/configs/dinat_s/cascade_mask_rcnn_dinat_s_tiny.*.py. Figures: detection/DiNAT.md.
"""

_base_ = './_cascade.py'

model = dict(
    backbone=dict(
        name='dinat_s_tiny',
        drop_path_rate=0.3,
        dilations=(28, 14, [1, 3, 1, 5, 1, 7], 3),
    )
)
recipe = dict(drop_path=0.3)
