"""BiFormer-B, RetinaNet 1x: 47.1 box AP published.

zoo train coco/biformer/retinanet_biformer_base --cfg-options model.backbone.checkpoint=FILE

object_detection/configs/coco/retinanet.1x.biformer_base.py:20-57. Figure: README.md.
"""

_base_ = './_retinanet.py'

model = dict(backbone=dict(name='biformer_base', drop_path_rate=0.3))
recipe = dict(drop_path=0.3)
