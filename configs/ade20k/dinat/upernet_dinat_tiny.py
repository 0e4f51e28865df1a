"""DiNAT-Tiny, UPerNet: 47.8 mIoU published, 48.8 of several scales.

zoo train ade20k/dinat/upernet_dinat_tiny --cfg-options model.backbone.checkpoint=FILE

segmentation/configs/dinat/upernet_dinat_tiny_512x512_160k_ade20k.py.
Figures: segmentation/DiNAT.md.
"""

_base_ = './_upernet.py'

model = dict(
    backbone=dict(
        name='dinat_tiny',
        drop_path_rate=0.3,
        dilations=(16, [1, 4, 1, 8], [1, 2, 1, 3, 1, 4, 1, 2, 1, 3, 1, 4, 1, 2, 1, 3, 1, 4], 2),
    )
)
recipe = dict(drop_path=0.3)
