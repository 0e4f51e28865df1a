"""A config's validation, of weights that a run has left."""

import copy
import json
import uuid
from pathlib import Path

from mmengine.dist import get_world_size
from safetensors.torch import load_file

from . import checkpoints, distributed
from .batches import fit
from .config import load_config
from .runner import Runner
from .validation import validate

__all__ = ['measure']

OF_TRAINING = ('train_dataloader', 'train_cfg', 'optim_wrapper', 'param_scheduler', 'val_dataloader', 'val_cfg')
MMENGINES_HOOKS = ('runtime_info', 'timer', 'sampler_seed', 'logger', 'param_scheduler', 'checkpoint')
# Hooks that measure too; others have nothing to do, or begin with the training.
OF_MEASURING = ('DensePictures',)


def measure(
    config: Path | str,
    checkpoint: Path | str,
    work_dir: Path | str | None = None,
    cfg_options: dict | None = None,
) -> dict[str, float]:
    """Measure weights on the validation data of a config. Under torchrun, every process calls this and has the result.

    Other settings of a test go through `cfg_options`, such as several scales and mirrored images:
    {'model.test.scales': [0.75, 1.0, 1.25], 'model.test.flip': True}.

    Args:
        config: path of an mmengine config, or name of one that comes with the zoo.
        checkpoint: iter_<n>.pth, best.pth or model.safetensors of a run of this config.
        work_dir: folder for measures.json; <the config's work_dir>/measured if None.
        cfg_options: values in place of the config's, by dotted name.

    Raises:
        FileNotFoundError: no such config or checkpoint.
        ConfigError: something in the config can't be made, or it has no validation.
        CheckpointError: the checkpoint is not one of the config's model.
    """
    cfg = load_config(config, cfg_options)
    path = Path(checkpoint).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f'There is no checkpoint {path}.')
    if cfg.get('val_dataloader') is None:
        raise ValueError(f'{config} has no val_dataloader: there is nothing to test on.')
    folder = Path(work_dir) if work_dir is not None else Path(cfg.work_dir, 'measured')
    with distributed.process_group() as launcher:
        distributed.on_first(validate, cfg, True, get_world_size())
        cfg = copy.deepcopy(fit(cfg, get_world_size()))
        cfg.test_dataloader, cfg.test_cfg, cfg.test_evaluator = cfg.val_dataloader, {}, cfg.val_evaluator
        for key in (*OF_TRAINING, 'val_evaluator'):
            cfg[key] = None
        hooks = [*(cfg.get('default_hooks') or {}).values(), *(cfg.get('custom_hooks') or ())]
        cfg.custom_hooks = [hook for hook in hooks if hook and hook.get('type') in OF_MEASURING]
        cfg.default_hooks = dict.fromkeys(MMENGINES_HOOKS)
        cfg.work_dir, cfg.launcher, cfg.resume = str(folder), launcher, False
        cfg.experiment_name = f'{folder.name}_{uuid.uuid4().hex}'
        runner = Runner.from_cfg(cfg)
        runner.load_weights(_read(path))
        measures = runner.test()
        text = json.dumps({'checkpoint': str(path), **measures}, indent=1) + '\n'
        out = folder / 'measures.json'
        distributed.on_first(checkpoints.write_atomically, out, lambda temporary: temporary.write_text(text))
        return measures


def _read(path: Path) -> dict:
    if path.suffix == '.safetensors':
        return load_file(path)
    return checkpoints.load(path)['state_dict']
