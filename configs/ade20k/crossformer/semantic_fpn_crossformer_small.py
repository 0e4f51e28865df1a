"""CrossFormer-S, Semantic FPN: 46.4 mIoU published.

zoo train ade20k/crossformer/semantic_fpn_crossformer_small --cfg-options model.backbone.checkpoint=FILE

Drop path: segmentation/crossformer_factory.py. Figure: README.md.
"""

_base_ = './_semantic_fpn.py'

model = dict(backbone=dict(name='crossformer_small', drop_path_rate=0.2))
recipe = dict(drop_path=0.2)
