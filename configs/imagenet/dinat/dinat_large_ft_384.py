"""DiNAT-Large of ImageNet-22k fine-tuned on ImageNet-1k at 384 pixels: 87.4 % top-1 published.

zoo train imagenet/dinat/dinat_large_ft_384

Values: configs/dinat_large_384.yml, dinat.py:160. Accuracy: DiNAT.md, which links the ImageNet-22k weights.
"""

_base_ = '../nat/_ft.py'

model = dict(
    backbone=dict(
        name='dinat_large',
        checkpoint='checkpoints/dinat_large_in22k_224.pth',
        num_classes=1000,
        dilations=(13, 6, 3, 1),
    )
)
train_dataloader = dict(dataset=dict(transform=dict(input_size=384)))
val_dataloader = dict(dataset=dict(transform=dict(input_size=384, crop_pct=1.0)))
optim_wrapper = dict(optimizer=dict(weight_decay=1e-10))
recipe = dict(top1=87.4, image_size=384, crop_pct=1.0, weight_decay=1e-10)
