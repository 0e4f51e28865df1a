"""MaxViT-T fine-tuned on ImageNet-1k at 384 pixels: 85.24 % top-1 published.

zoo train imagenet/maxvit/maxvit_tiny_ft_384

Values: hp/vision_i1k.py:88. Accuracy: README.md.
The model is timm's of this size, which resizes the bias tables of imagenet/maxvit/maxvit_tiny to its windows.
"""

_base_ = './_ft.py'

model = dict(
    backbone=dict(
        name='maxvit_tiny_tf_384',
        checkpoint='work_dirs/imagenet/maxvit/maxvit_tiny/model.safetensors',
        drop_path_rate=0.2,
    )
)
train_dataloader = dict(dataset=dict(transform=dict(input_size=384)))
val_dataloader = dict(dataset=dict(transform=dict(input_size=384, crop_pct=384 / 416)))
recipe = dict(drop_path=0.2, image_size=384, crop_pct=384 / 416, top1=85.24)
