"""CrossFormer-S, RetinaNet 1x: 44.4 box AP published.

zoo train coco/crossformer/retinanet_crossformer_small --cfg-options model.backbone.checkpoint=FILE

detection/configs/crossformer/retinanet_crossformer_s*.
Drop path: detection/crossformer_factory.py. Figure: README.md.
"""

_base_ = './_retinanet.py'

model = dict(backbone=dict(name='crossformer_small', drop_path_rate=0.2))
recipe = dict(drop_path=0.2)
