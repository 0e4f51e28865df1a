"""DiNAT_s-Large, UPerNet: 53.4 mIoU published, 54.6 of several scales.

zoo train ade20k/dinat_s/upernet_dinat_s_large --cfg-options model.backbone.checkpoint=FILE

segmentation/configs/dinat_s/upernet_dinat_s_large_640x640_160k_ade20k.py.
Figures: segmentation/DiNAT.md. From ImageNet-22k. Dilated for 640 pixels, but the crop is 512.
"""

_base_ = './_upernet.py'

model = dict(
    backbone=dict(
        name='dinat_s_large',
        drop_path_rate=0.3,
        dilations=(20, 10, [1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 2], 2),
    )
)
recipe = dict(drop_path=0.3)
