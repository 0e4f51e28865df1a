"""UPerNet on a shallow VAN-B0, untrained, on scenes of digits: a class for the canvas and one for each digit.

zoo train dense_demo/upernet_van_b0

Measured by `make dense-demo` on 200 test scenes: 76.7 % mIoU.
"""

_base_ = ['../_base_/dense_demo.py', '../_base_/runtime.py']

tilt = dict(type='RandomAffine', degrees=10, scale=(0.8, 1.2), shear=10, interpolation=2)  # bilinear
train_dataloader = dict(dataset=dict(type='DigitSceneMasks', root='data/digit_scenes', split='train', transform=[tilt]))
val_dataloader = dict(dataset=dict(type='DigitSceneMasks', root='data/digit_scenes', split='test'))
val_evaluator = dict(type='MeanIoU')
model = dict(
    type='Segmentor',
    backbone=dict(name='van_b0', depths=(1, 1, 2, 1), mlp_ratios=(4, 4, 4, 4)),
    head=dict(type='UPerHead', num_classes=11, channels=64, dropout=0.0),
    auxiliary=[dict(type='FCNHead', level=2, channels=64, weight=0.4)],
    loss=dict(class_weight=(0.2, *[1.0] * 10)),  # the canvas has 87 % of the pixels
)
optim_wrapper = dict(optimizer=dict(lr=2e-3))
train_cfg = dict(max_epochs=7, val_interval=7)
default_hooks = dict(checkpoint=dict(best='mIoU'))
