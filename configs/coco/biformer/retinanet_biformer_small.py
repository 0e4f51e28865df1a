"""BiFormer-S, RetinaNet 1x: 45.9 box AP published.

zoo train coco/biformer/retinanet_biformer_small --cfg-options model.backbone.checkpoint=FILE

object_detection/configs/coco/retinanet.1x.biformer_small.py:20-57. Figure: README.md. Run again before its release:
47.3.
"""

_base_ = './_retinanet.py'

model = dict(backbone=dict(name='biformer_small', drop_path_rate=0.2))
recipe = dict(drop_path=0.2)
