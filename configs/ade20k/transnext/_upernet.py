"""TransNeXt in UPerNet, as DaiShiResearch/TransNeXt (c8a9974) trains it: segmentation/upernet/configs.

Weight decay 0.05. Tests slide a window of 512 by 341; position biases are made for 512 pixels and resized. The other
published figures: whole images with model.backbone.interpolation_size=800, or None (made for each map itself), several
scales and mirrored images.
"""

_base_ = '../../_base_/upernet.py'

model = dict(backbone=dict(interpolation_size=512), test=dict(mode='slide', crop=(512, 512), stride=(341, 341)))
optim_wrapper = dict(
    optimizer=dict(weight_decay=0.05),
    paramwise_cfg=dict(no_decay=('query_embedding', 'relative_pos_bias_local', 'cpb', 'temperature', 'norm')),
)
recipe = dict(weight_decay=0.05)
