"""DiNAT_s-Base, UPerNet: 49.4 mIoU published, 50.2 of several scales.

zoo train ade20k/dinat_s/upernet_dinat_s_base --cfg-options model.backbone.checkpoint=FILE

segmentation/configs/dinat_s/upernet_dinat_s_base_512x512_160k_ade20k.py.
Figures: segmentation/DiNAT.md.
"""

_base_ = './_upernet.py'

model = dict(
    backbone=dict(
        name='dinat_s_base',
        drop_path_rate=0.3,
        dilations=(16, 8, [1, 2, 1, 3, 1, 4, 1, 2, 1, 3, 1, 4, 1, 2, 1, 3, 1, 4], 2),
    )
)
recipe = dict(drop_path=0.3)
