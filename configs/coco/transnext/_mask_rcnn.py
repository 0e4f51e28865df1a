"""TransNeXt in Mask R-CNN 1x, as DaiShiResearch/TransNeXt (c8a9974) trains it: detection/maskrcnn/configs.

Position biases are made for 800 pixels and resized to each map; with model.backbone.interpolation_size=None they are
made for the map itself.
"""

_base_ = '../../_base_/mask_rcnn.py'

model = dict(backbone=dict(interpolation_size=800))
optim_wrapper = dict(
    paramwise_cfg=dict(no_decay=('query_embedding', 'relative_pos_bias_local', 'cpb', 'temperature', 'norm'))
)
