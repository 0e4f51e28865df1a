"""DiNAT-Tiny, Mask R-CNN 3x: 48.6 box AP, 43.5 mask AP published.

zoo train coco/dinat/mask_rcnn_dinat_tiny --cfg-options model.backbone.checkpoint=FILE

detection/configs/dinat/mask_rcnn_dinat_tiny.*.py. Figures: detection/DiNAT.md.
"""

_base_ = './_mask_rcnn.py'

model = dict(
    backbone=dict(
        name='dinat_tiny',
        drop_path_rate=0.2,
        dilations=(28, [1, 7, 1, 14], [1, 3, 1, 5, 1, 7, 1, 3, 1, 5, 1, 7, 1, 3, 1, 5, 1, 7], 3),
    )
)
recipe = dict(drop_path=0.2)
