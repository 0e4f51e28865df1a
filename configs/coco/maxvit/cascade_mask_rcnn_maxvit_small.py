"""MaxViT-S, Cascade Mask R-CNN at 896 pixels: 53.1 box AP published (53.5, and 45.8 mask AP, in the code's README).

zoo train coco/maxvit/cascade_mask_rcnn_maxvit_small --cfg-options model.backbone.checkpoint=FILE

tensorflow/models, official/projects/maxvit, configs/experiments/coco_maxvits_i896_crcnn.yaml.
"""

_base_ = './_cascade.py'

model = dict(backbone=dict(name='maxvit_small', drop_path_rate=0.5))
recipe = dict(drop_path=0.5)
