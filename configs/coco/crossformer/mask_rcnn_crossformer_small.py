"""CrossFormer-S, Mask R-CNN 1x: 45.4 box AP, 41.4 mask AP published.

zoo train coco/crossformer/mask_rcnn_crossformer_small --cfg-options model.backbone.checkpoint=FILE

detection/configs/crossformer/mask_rcnn_crossformer_s*.
Drop path: detection/crossformer_factory.py. Figures: README.md.
"""

_base_ = './_mask_rcnn.py'

model = dict(backbone=dict(name='crossformer_small', drop_path_rate=0.2))
recipe = dict(drop_path=0.2)
