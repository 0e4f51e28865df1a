"""DiNAT-Mini, Mask R-CNN 3x: 47.2 box AP, 42.5 mask AP published.

zoo train coco/dinat/mask_rcnn_dinat_mini --cfg-options model.backbone.checkpoint=FILE

detection/configs/dinat/mask_rcnn_dinat_mini.*.py. Figures: detection/DiNAT.md.
"""

_base_ = './_mask_rcnn.py'

model = dict(
    backbone=dict(
        name='dinat_mini',
        drop_path_rate=0.2,
        dilations=(28, [1, 7, 1, 14], [1, 3, 1, 5, 1, 7], 3),
    )
)
recipe = dict(drop_path=0.2)
