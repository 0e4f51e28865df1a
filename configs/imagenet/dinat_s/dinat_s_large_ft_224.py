"""DiNAT_s-Large of ImageNet-22k fine-tuned on ImageNet-1k at 224 pixels: 86.5 % top-1 published.

zoo train imagenet/dinat_s/dinat_s_large_ft_224

Values: configs/dinat_s_large.yml, which names dinat_large by mistake; dinats.py:397. Accuracy: DiNAT.md, which
links the ImageNet-22k weights.
"""

_base_ = '../nat/_ft.py'

model = dict(
    backbone=dict(
        name='dinat_s_large',
        checkpoint='checkpoints/dinat_s_large_in22k_224.pth',
        num_classes=1000,
    )
)
recipe = dict(top1=86.5)
