"""Cascade Mask R-CNN of 36 epochs: stages of four convolutions and a layer, synchronized norms, GIoU of weight 10."""

_base_ = ['./coco_3x.py', './detector_3x.py', './runtime.py']

model = dict(
    head=dict(type='CascadeRCNN', num_classes=80, masks=True, box_head='4conv1fc', norm='syncbn', box_loss='giou')
)
default_hooks = dict(checkpoint=dict(best='segm_AP'))
