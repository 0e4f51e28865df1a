"""BiFormer-T on 1,797 handwritten digits, 1,200 of them to train on.

zoo train quickstart/biformer_digits

About 4.5 minutes on one free CPU core. One run (seed 0, one thread) reached 98.83 % top-1 on the 597 test images; the
last digits depend on the number of threads.
"""

_base_ = ['../_base_/digits.py', '../_base_/adamw_cosine.py', '../_base_/runtime.py']

model = dict(
    type='ImageClassifier',
    backbone=dict(name='biformer_tiny', num_classes=10, n_win=4, topks=(1, 2, 4, -2)),
    loss=dict(type='cross_entropy', label_smoothing=0.1),
)
optim_wrapper = dict(optimizer=dict(lr=5e-4))
train_cfg = dict(max_epochs=9)
custom_hooks = [dict(type='EMAHook', momentum=0.02)]  # validates, and exports, averaged weights
