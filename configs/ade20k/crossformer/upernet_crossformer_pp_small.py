"""CrossFormer++-S, UPerNet: 49.4 mIoU published, 50.8 of several scales.

zoo train ade20k/crossformer/upernet_crossformer_pp_small --cfg-options model.backbone.checkpoint=FILE

Drop path: segmentation/crossformer_factory.py. Figures: README.md.
"""

_base_ = './_upernet.py'

model = dict(
    backbone=dict(name='crossformer_pp_small', drop_path_rate=0.2, group_sizes=(7, 7, 7, 7), intervals=(8, 4, 2, 1))
)
recipe = dict(drop_path=0.2)
