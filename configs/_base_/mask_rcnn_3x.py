"""Mask R-CNN of 36 epochs on images of many sizes."""

_base_ = ['./coco_3x.py', './detector_3x.py', './runtime.py']

model = dict(head=dict(type='MaskRCNN', num_classes=80))
default_hooks = dict(checkpoint=dict(best='segm_AP'))
