"""What a config's batch and learning rate come to on a number of processes."""

import copy

from mmengine.config import Config

__all__ = ['effective_batch', 'fit']


def effective_batch(cfg: Config, world_size: int) -> int:
    """Images in an optimizer step: processes x images a process x batches that are accumulated."""
    return world_size * cfg.train_dataloader.batch_size * cfg.optim_wrapper.get('accumulative_counts', 1)


def fit(cfg: Config, world_size: int) -> Config:
    """A copy of a config for `world_size` processes; fitting it again changes nothing.

    With `total_batch` (images in an optimizer step), `train_dataloader.batch_size` is what fits in the memory of a
    process: the greatest batch that is not over it and divides a process's share is taken, an even one for mixup, and
    the rest accumulated. With `scale_lr = dict(base_batch=..., scaled=('lr', 'min_lr', 'warmup_lr'))` the rates named
    are those of a step of `base_batch` images; they are multiplied by the effective batch over it. An epoch of
    accumulated batches is a whole number of steps.

    Raises:
        ValueError: the processes don't divide `total_batch`, no batch near `batch_size` divides a process's share,
            or `scale_lr` names something else.
    """
    cfg = copy.deepcopy(cfg)
    if cfg.get('total_batch'):
        _divide(cfg, world_size)
    accumulated = cfg.optim_wrapper.get('accumulative_counts', 1)
    if accumulated > 1 and cfg.train_dataloader.get('sampler', {}).get('type') == 'ShuffledStream':
        cfg.train_dataloader.sampler.multiple = cfg.train_dataloader.batch_size * accumulated
    if cfg.get('scale_lr'):
        _scale(cfg, effective_batch(cfg, world_size))
    return cfg


def _divide(cfg, world_size: int) -> None:
    total, limit = cfg.total_batch, cfg.train_dataloader.batch_size
    if total % world_size:
        raise ValueError(f'{world_size} processes do not divide total_batch={total}. Use a number of them that does.')
    share = total // world_size
    step = 2 if cfg.model.get('mixup') else 1
    sizes = [size for size in range(step, min(limit, share) + 1, step) if share % size == 0]
    if not sizes or 2 * sizes[-1] < min(limit, share):
        near = [size for size in range(step, share + 1, step) if share % size == 0]
        raise ValueError(
            f'total_batch={total} leaves {share} images to each of {world_size} processes, which no '
            f'{"even " if step == 2 else ""}batch near train_dataloader.batch_size={limit} divides. '
            f'Those that do: {", ".join(map(str, near)) or "none"}.'
        )
    cfg.train_dataloader.batch_size = sizes[-1]
    cfg.optim_wrapper.accumulative_counts = share // sizes[-1]


def _scale(cfg, batch: int) -> None:
    rule = cfg.scale_lr
    unknown = sorted(set(rule) - {'base_batch', 'scaled'})
    if unknown or 'base_batch' not in rule:
        raise ValueError(f'scale_lr takes base_batch and scaled, got {dict(rule)}.')
    factor = batch / rule.base_batch
    for name in rule.get('scaled', ('lr',)):
        if name == 'lr':
            cfg.optim_wrapper.optimizer.lr *= factor
        elif name in ('min_lr', 'warmup_lr') and name in cfg.param_scheduler:
            cfg.param_scheduler[name] *= factor
        else:
            raise ValueError(f"scale_lr can scale 'lr', and 'min_lr' and 'warmup_lr' of param_scheduler; got {name!r}.")
    rule.base_batch = batch  # the rates are that batch's now
