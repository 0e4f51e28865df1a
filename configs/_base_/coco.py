"""COCO 2017's objects in data/coco/{train2017,val2017,annotations}, at 1333x800, mirrored at random; 16 images a step.

Two of train2017's annotations have no height: on_error='skip' lists and leaves out what is broken.
"""

total_batch = 16
train_dataloader = dict(
    dataset=dict(
        type='CocoInstances',
        root='data/coco/train2017',
        annotations='data/coco/annotations/instances_train2017.json',
        transform=[dict(type='ResizeKeepRatio', scale=(1333, 800)), dict(type='RandomHorizontalFlip', p=0.5)],
        on_error='skip',
    ),
    sampler=dict(type='ShuffledStream'),
    collate_fn=dict(type='collate'),
    batch_size=2,  # what a process holds at most
    num_workers=4,
    drop_last=True,
)
val_dataloader = dict(
    dataset=dict(
        type='CocoInstances',
        root='data/coco/val2017',
        annotations='data/coco/annotations/instances_val2017.json',
        training=False,
    ),
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='collate'),
    batch_size=1,
    num_workers=4,
)
val_cfg = {}
val_evaluator = dict(type='CocoAP', iou_types=('bbox', 'segm'))
