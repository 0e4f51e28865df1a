"""Mask R-CNN: levels of strides 4 to 64, boxes by two layers of 1024, masks by four convolutions of 256."""

_base_ = ['./coco.py', './detector.py', './runtime.py']

model = dict(head=dict(type='MaskRCNN', num_classes=80))
default_hooks = dict(checkpoint=dict(best='segm_AP'))
