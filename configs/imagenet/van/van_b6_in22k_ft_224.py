"""VAN-B6 of ImageNet-22k fine-tuned on ImageNet-1k at 224 pixels; accuracy not published.

zoo train imagenet/van/van_b6_in22k_ft_224

Drop path: finetune.sh.
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
recipe = dict(drop_path=0.3)
