"""CrossFormer-B, UPerNet: 49.7 mIoU published, 50.6 of several scales.

zoo train ade20k/crossformer/upernet_crossformer_base --cfg-options model.backbone.checkpoint=FILE

Drop path: segmentation/crossformer_factory.py. Figures: README.md.
"""

_base_ = './_upernet.py'

model = dict(backbone=dict(name='crossformer_base', drop_path_rate=0.3))
recipe = dict(drop_path=0.3)
