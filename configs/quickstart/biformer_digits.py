"""BiFormer-T on 1,797 handwritten digits.

zoo train quickstart/biformer_digits
"""

_base_ = ['../_base_/digits.py', '../_base_/adamw_cosine.py', '../_base_/runtime.py']

model = dict(
    type='ImageClassifier',
    backbone=dict(name='biformer_tiny', num_classes=10, n_win=4, topks=(1, 2, 4, -2), drop_path_rate=0.1),
    loss=dict(type='cross_entropy', label_smoothing=0.1),
)
train_cfg = dict(max_epochs=8)
