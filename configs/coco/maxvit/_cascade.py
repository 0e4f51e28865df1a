"""MaxViT in Cascade Mask R-CNN at 896 pixels, as tensorflow/models (official/projects/maxvit) trains it, on TPUs.

- Windows and grid of 28 whose biases are those of 7, resized (`scale_ratio` 28/7). Images of up to 896 pixels in a
  square of that. Levels of strides 8 to 128, anchors of 3 strides, two convolutions before the proposals.
- 256 images; the cosine ends after 90,000 steps, and so does this run: the source's goes on to 115,750 at a rate of 0.
  An average of decay 0.9998. The source adds an L2 term of 1e-7 to the weight decay of 0.05.
- Not known: how images are scaled at random (here not at all), what isn't decayed, the average of what is published,
  the parts of the cascade's heads (here those of the other families' 3x), whether gradients are clipped, precision.
"""

_base_ = '../../_base_/cascade_mask_rcnn.py'

total_batch = 256
sync_bn = True
model = dict(
    backbone=dict(window_size=28, pretrained_window_size=7),
    neck=dict(strides=(8, 16, 32, 64, 128), extra_levels=0),
    head=dict(rpn=dict(anchor_scale=3.0, convs=2)),
    size_divisor=896,
    test=dict(resize=(896, 896)),
)
train_dataloader = dict(
    dataset=dict(
        transform=[dict(type='ResizeKeepRatio', scale=(896, 896)), dict(type='RandomHorizontalFlip', p=0.5)],
    )
)
optim_wrapper = dict(optimizer=dict(lr=3e-3))
param_scheduler = dict(
    _delete_=True, type='DenseLR', by_epoch=False, sched='cosine', warmup_steps=6000, warmup_start=0.0
)
train_cfg = dict(_delete_=True, type='TrainLoop', max_steps=90_000, val_interval=4500)
default_hooks = dict(checkpoint=dict(interval_iters=4500))
custom_hooks = [dict(type='DensePictures'), dict(type='EMA', decay=0.9998)]
recipe = dict(_delete_=True, total_batch=256, lr=3e-3, steps=90_000, weight_decay=0.05, ema=0.9998, precision='float32')
