"""The detectors' 36 epochs, the rate falling at the 27th and the 33rd ("3x")."""

_base_ = './detector.py'

param_scheduler = dict(milestones=(27 / 36, 33 / 36))
train_cfg = dict(max_epochs=36)
recipe = dict(epochs=36)
