"""DiNAT-Large, Cascade Mask R-CNN 3x: 55.3 box AP, 47.8 mask AP published.

zoo train coco/dinat/cascade_mask_rcnn_dinat_large --cfg-options model.backbone.checkpoint=FILE

detection/configs/dinat/cascade_mask_rcnn_dinat_large.*.py. Figures: detection/DiNAT.md. From ImageNet-22k. Without
fp16.
"""

_base_ = './_cascade.py'

model = dict(
    backbone=dict(
        name='dinat_large',
        drop_path_rate=0.6,
        dilations=(28, [1, 7, 1, 14], [1, 3, 1, 5, 1, 7, 1, 3, 1, 5, 1, 7, 1, 3, 1, 5, 1, 7], 3),
    )
)
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    constructor='DenseParamGroups',
    optimizer=dict(type='AdamW', lr=7.5e-05, weight_decay=0.05),
    paramwise_cfg=dict(no_decay=('rpb', 'norm')),
)
recipe = dict(drop_path=0.6, lr=7.5e-05, precision='float32')
