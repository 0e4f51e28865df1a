"""CrossFormer-B, Mask R-CNN 1x: 47.2 box AP, 42.7 mask AP published.

zoo train coco/crossformer/mask_rcnn_crossformer_base --cfg-options model.backbone.checkpoint=FILE

detection/configs/crossformer/mask_rcnn_crossformer_b*.
Drop path: detection/crossformer_factory.py. Figures: README.md.
"""

_base_ = './_mask_rcnn.py'

model = dict(backbone=dict(name='crossformer_base', drop_path_rate=0.3))
recipe = dict(drop_path=0.3)
