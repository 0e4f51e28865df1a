"""CrossFormer++-S, RetinaNet 1x: 45.1 box AP published.

zoo train coco/crossformer/retinanet_crossformer_pp_small --cfg-options model.backbone.checkpoint=FILE

Groups of 7 at intervals of 8, 4, 2 and 1, unlike classification.
detection/configs/crossformer_pp/retinanet_crossformerpp_s*.
Drop path: detection/crossformer_factory.py. Figure: README.md.
"""

_base_ = './_retinanet.py'

model = dict(
    backbone=dict(name='crossformer_pp_small', drop_path_rate=0.2, group_sizes=(7, 7, 7, 7), intervals=(8, 4, 2, 1))
)
recipe = dict(drop_path=0.2)
