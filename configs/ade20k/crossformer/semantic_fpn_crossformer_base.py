"""CrossFormer-B, Semantic FPN: 48.0 mIoU published.

zoo train ade20k/crossformer/semantic_fpn_crossformer_base --cfg-options model.backbone.checkpoint=FILE

Drop path: segmentation/crossformer_factory.py. Figure: README.md.
"""

_base_ = './_semantic_fpn.py'

model = dict(backbone=dict(name='crossformer_base', drop_path_rate=0.3))
recipe = dict(drop_path=0.3)
