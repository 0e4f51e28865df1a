"""CrossFormer++-S, Semantic FPN: 47.4 mIoU published.

zoo train ade20k/crossformer/semantic_fpn_crossformer_pp_small --cfg-options model.backbone.checkpoint=FILE

Drop path: segmentation/crossformer_factory.py. Figure: README.md.
"""

_base_ = './_semantic_fpn.py'

model = dict(
    backbone=dict(name='crossformer_pp_small', drop_path_rate=0.2, group_sizes=(7, 7, 7, 7), intervals=(8, 4, 2, 1))
)
recipe = dict(drop_path=0.2)
