"""BiFormer-STL, channels-first, on ImageNet-1k: 82.7 % top-1 published.

zoo train imagenet/biformer/biformer_stl_nchw

Accuracy: README.md.
No file of the code states the drop path: set model.backbone.drop_path_rate, which is 0 here. Its MaxViT of the same
layout used 0.1 (semantic_segmentation/slurm_train.sh:12).
"""

_base_ = './_biformer.py'

model = dict(backbone=dict(name='biformer_stl_nchw'))
recipe = dict(top1=82.7, unknown=('model.backbone.drop_path_rate',))
