"""VAN-B6 of ImageNet-22k fine-tuned on ImageNet-1k at 384 pixels; accuracy not published.

zoo train imagenet/van/van_b6_in22k_ft_384

Drop path: finetune_384.sh. From 384 pixels images are squashed to the square (datasets.py:62-72).
The weights are those of imagenet/van/van_b6_in22k.
"""

_base_ = './_van_in22k_ft.py'

model = dict(
    backbone=dict(
        name='van_b6',
        checkpoint='work_dirs/imagenet/van/van_b6_in22k/model.safetensors',
        num_classes=1000,
        drop_path_rate=0.3,
    )
)
train_dataloader = dict(dataset=dict(transform=dict(input_size=384)), batch_size=16)
val_dataloader = dict(dataset=dict(transform=dict(input_size=384, crop_pct=1.0, crop_mode='squash')))
recipe = dict(drop_path=0.3, image_size=384, crop_pct=1.0)
