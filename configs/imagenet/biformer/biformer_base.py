"""BiFormer-B on ImageNet-1k: 84.3 % top-1 published.

zoo train imagenet/biformer/biformer_base

Accuracy: README.md.
No file of the code states the drop path: set model.backbone.drop_path_rate, which is 0 here.
"""

_base_ = './_biformer.py'

model = dict(backbone=dict(name='biformer_base'))
recipe = dict(top1=84.3, unknown=('model.backbone.drop_path_rate',))
