"""CrossFormer-S, UPerNet: 47.6 mIoU published, 48.4 of several scales.

zoo train ade20k/crossformer/upernet_crossformer_small --cfg-options model.backbone.checkpoint=FILE

Drop path: segmentation/crossformer_factory.py. Figures: README.md.
"""

_base_ = './_upernet.py'

model = dict(backbone=dict(name='crossformer_small', drop_path_rate=0.2))
recipe = dict(drop_path=0.2)
