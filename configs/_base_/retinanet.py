"""RetinaNet: levels of strides 8 to 128, the two coarsest by convolutions of the backbone's last map."""

_base_ = ['./coco.py', './detector.py', './runtime.py']

train_dataloader = dict(dataset=dict(masks=False))
val_dataloader = dict(dataset=dict(masks=False))
val_evaluator = dict(iou_types=('bbox',))
model = dict(
    backbone=dict(out_indices=(1, 2, 3)),
    neck=dict(extra_levels=2, extra='conv_on_input'),
    head=dict(type='RetinaNet', num_classes=80),
)
default_hooks = dict(checkpoint=dict(best='bbox_AP'))
