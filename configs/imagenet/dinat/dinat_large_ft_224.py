"""DiNAT-Large of ImageNet-22k fine-tuned on ImageNet-1k at 224 pixels: 86.6 % top-1 published.

zoo train imagenet/dinat/dinat_large_ft_224

Values: configs/dinat_large.yml, dinat.py:136. Accuracy: DiNAT.md, which links the ImageNet-22k weights.
"""

_base_ = '../nat/_ft.py'

model = dict(
    backbone=dict(
        name='dinat_large',
        checkpoint='checkpoints/dinat_large_in22k_224.pth',
        num_classes=1000,
    )
)
recipe = dict(top1=86.6)
