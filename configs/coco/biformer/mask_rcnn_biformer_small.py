"""BiFormer-S, Mask R-CNN 1x: 47.8 box AP, 43.2 mask AP published.

zoo train coco/biformer/mask_rcnn_biformer_small --cfg-options model.backbone.checkpoint=FILE

object_detection/configs/coco/maskrcnn.1x.biformer_small.py:24-68. Figures: README.md. Run again before its release:
48.1 and 43.6.
"""

_base_ = './_mask_rcnn.py'

model = dict(backbone=dict(name='biformer_small', drop_path_rate=0.2))
recipe = dict(drop_path=0.2)
