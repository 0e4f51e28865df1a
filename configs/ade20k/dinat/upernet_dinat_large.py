"""DiNAT-Large, UPerNet: 54.0 mIoU published, 54.9 of several scales.

zoo train ade20k/dinat/upernet_dinat_large --cfg-options model.backbone.checkpoint=FILE

segmentation/configs/dinat/upernet_dinat_large_640x640_160k_ade20k.py.
Figures: segmentation/DiNAT.md. Without fp16. From ImageNet-22k. Dilated for 640 pixels, but the crop is 512.
"""

_base_ = './_upernet.py'

model = dict(
    backbone=dict(
        name='dinat_large',
        drop_path_rate=0.3,
        dilations=(20, [1, 5, 1, 10], [1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 2], 2),
    )
)
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    constructor='DenseParamGroups',
    optimizer=dict(type='AdamW', lr=6e-5, weight_decay=0.01),
    paramwise_cfg=dict(no_decay=('rpb', 'norm')),
)
recipe = dict(drop_path=0.3, precision='float32')
