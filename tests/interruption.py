"""A stand-in for a preemption, in the process itself."""

from mmengine.hooks import Hook

from zoo.train.registry import HOOKS


class Interrupted(Exception):
    pass


@HOOKS.register_module()
class StopAt(Hook):
    """Raise before the iteration of that number."""

    priority = 'VERY_LOW'

    def __init__(self, iteration):
        self.iteration = iteration

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if batch_idx == self.iteration:
            raise Interrupted
