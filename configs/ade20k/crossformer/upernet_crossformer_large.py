"""CrossFormer-L, UPerNet: 50.4 mIoU published, 51.4 of several scales.

zoo train ade20k/crossformer/upernet_crossformer_large --cfg-options model.backbone.checkpoint=FILE

Drop path: segmentation/crossformer_factory.py. Figures: README.md.
"""

_base_ = './_upernet.py'

model = dict(backbone=dict(name='crossformer_large', drop_path_rate=0.5))
recipe = dict(drop_path=0.5)
