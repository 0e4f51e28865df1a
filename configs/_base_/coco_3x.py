"""COCO as the 3x schedules augment it, after DETR: short sides of 480 to 800, of the image or of a crop of it."""

_base_ = './coco.py'

_sides = [(1333, side) for side in range(480, 801, 32)]
_whole = [dict(type='RandomChoiceResize', scales=_sides)]
_crop = [
    dict(type='RandomChoiceResize', scales=[(4200, 400), (4200, 500), (4200, 600)]),
    dict(type='RandomCropSize', sides=(384, 600)),
    dict(type='RandomChoiceResize', scales=_sides),
]
train_dataloader = dict(
    dataset=dict(
        transform=[
            dict(type='RandomHorizontalFlip', p=0.5),
            dict(type='RandomChoice', transforms=[_whole, _crop]),
        ]
    )
)
