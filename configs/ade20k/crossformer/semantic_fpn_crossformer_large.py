"""CrossFormer-L, Semantic FPN: 49.1 mIoU published.

zoo train ade20k/crossformer/semantic_fpn_crossformer_large --cfg-options model.backbone.checkpoint=FILE

Drop path: segmentation/crossformer_factory.py. Figure: README.md.
"""

_base_ = './_semantic_fpn.py'

model = dict(
    backbone=dict(name='crossformer_large', drop_path_rate=0.5, group_sizes=(14, 14, 7, 7), intervals=(16, 8, 2, 1))
)
recipe = dict(drop_path=0.5)
