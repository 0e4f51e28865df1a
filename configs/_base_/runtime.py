"""Hooks, seed and logging of every run."""

default_scope = 'zoo'
default_hooks = dict(
    seed=dict(type='IterationSeed'),
    checkpoint=dict(type='Checkpoints', interval=1, keep=2),
    curve=dict(type='Curve', interval=10),
    progress=dict(type='ProgressBar'),
    speed=dict(type='Speed'),
    broken_images=dict(type='BrokenImages'),
    runtime_info=dict(type='RuntimeInfo'),
    timer=None,
    sampler_seed=None,
    logger=None,
)
visualizer = dict(type='Visualizer', vis_backends=None)
randomness = dict(seed=0)
log_level = 'ERROR'  # mmengine warns at each build that the scope has no top-level module of registries
