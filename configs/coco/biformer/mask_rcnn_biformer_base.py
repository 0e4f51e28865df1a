"""BiFormer-B, Mask R-CNN 1x: 48.6 box AP, 43.7 mask AP published.

zoo train coco/biformer/mask_rcnn_biformer_base --cfg-options model.backbone.checkpoint=FILE

object_detection/configs/coco/maskrcnn.1x.biformer_base.py:24-68. Figures: README.md.
"""

_base_ = './_mask_rcnn.py'

model = dict(backbone=dict(name='biformer_base', drop_path_rate=0.3))
recipe = dict(drop_path=0.3)
