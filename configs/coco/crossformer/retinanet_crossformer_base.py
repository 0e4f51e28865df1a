"""CrossFormer-B, RetinaNet 1x: 46.2 box AP published.

zoo train coco/crossformer/retinanet_crossformer_base --cfg-options model.backbone.checkpoint=FILE

detection/configs/crossformer/retinanet_crossformer_b*.
Drop path: detection/crossformer_factory.py. Figure: README.md.
"""

_base_ = './_retinanet.py'

model = dict(backbone=dict(name='crossformer_base', drop_path_rate=0.3))
recipe = dict(drop_path=0.3)
