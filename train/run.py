"""Train what a config describes."""

import os
import uuid
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.dist import barrier, is_main_process
from torch import distributed

from . import checkpoints
from .config import load_config
from .records import ProgressBar, read_curve
from .runner import Runner

__all__ = ['TrainResult', 'train']


@dataclass
class TrainResult:
    """What a training run reached, and its files.

    Attributes:
        metrics: of the last validation, in per cent: top1, top5.
        work_dir: where the files are.
        checkpoint: the last one; `train(..., resume=True)` goes on from it.
        best: that of the best validation.
        weights: the backbone's last weights, for `timm.create_model(name, checkpoint_path=...)`.
        curve: the record of the run, JSON lines.
        picture: the same drawn.
    """

    metrics: dict[str, float]
    work_dir: Path
    checkpoint: Path
    best: Path
    weights: Path
    curve: Path
    picture: Path

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy of the last validation, in per cent."""
        return self.metrics['top1']


def train(
    config: Path | str,
    work_dir: Path | str | None = None,
    resume: bool = False,
    cfg_options: dict | None = None,
) -> TrainResult:
    """Train an image classifier. Under torchrun, every process calls this and has the result.

    Args:
        config: path of an mmengine config, or name of one that comes with the zoo ('quickstart/biformer_digits').
        work_dir: folder for the run's files; the config's, or work_dirs/<name>, if None.
        resume: go on from the folder's last checkpoint, to the same weights as without the interruption.
        cfg_options: values in place of the config's, by dotted name.

    Raises:
        FileNotFoundError: no such config or data.
        FileExistsError: the folder has checkpoints of another run, and resume is false.
        ValueError: what the config asks for can't be made, or data and model disagree on the classes.
    """
    cfg = load_config(config, cfg_options)
    cfg.work_dir = str(work_dir or cfg.work_dir)
    cfg.resume = resume
    cfg.launcher = _init_distributed()
    cfg.experiment_name = f'{Path(cfg.work_dir).name}_{uuid.uuid4().hex}'  # mmengine gives runs of one name one state
    runner = Runner.from_cfg(cfg)
    try:
        runner.train()
    finally:
        for hook in runner.hooks:
            if isinstance(hook, ProgressBar):
                hook.close()
    return _result(Path(runner.work_dir))


def _result(folder: Path) -> TrainResult:
    checkpoint, weights = checkpoints.latest(folder), folder / 'model.safetensors'
    if is_main_process():
        checkpoints.export_backbone(checkpoint, weights)
    barrier()
    validations = [record for record in read_curve(folder / 'curve.jsonl') if 'loss' not in record]
    metrics = {key: value for key, value in validations[-1].items() if key not in ('iter', 'epoch')}
    return TrainResult(
        metrics=metrics,
        work_dir=folder,
        checkpoint=checkpoint,
        best=folder / 'best.pth',
        weights=weights,
        curve=folder / 'curve.jsonl',
        picture=folder / 'curve.png',
    )


def _init_distributed() -> str:
    """Join the process group that torchrun asks for, and return mmengine's word for it.

    Before the runner does it, as mmengine then asks CUDA for a device even if there is none.
    """
    if 'LOCAL_RANK' not in os.environ:
        return 'none'
    if not distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
        distributed.init_process_group('nccl' if torch.cuda.is_available() else 'gloo')
    return 'pytorch'
