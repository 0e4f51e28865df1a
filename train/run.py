"""Train what a config describes."""

import sys
import uuid
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import get_world_size, is_main_process
from rich.console import Console
from torch.distributed.elastic.multiprocessing.errors import record

from . import checkpoints, distributed
from .batches import fit
from .config import load_config
from .preflight import preflight as rehearse
from .records import ProgressBar, read_curve
from .report import write_report
from .runner import Runner
from .signals import Preempted
from .validation import validate

__all__ = ['TrainResult', 'train']


@dataclass
class TrainResult:
    """What a training run reached, and its files.

    Attributes:
        metrics: of the last validation, in per cent: top1 and top5, or what the config's val_evaluator measures.
        work_dir: where the files are.
        checkpoint: the last one; `train(..., resume=True)` goes on from it.
        best: that of the best validation.
        weights: the last weights: of a classifier its backbone's, for `timm.create_model(name, checkpoint_path=...)`;
            of a detector or segmentor all, for `measure`.
        report: all about the run, for people.
        curve: the record of the run, JSON lines.
        picture: the same drawn.
    """

    metrics: dict[str, float]
    work_dir: Path
    checkpoint: Path
    best: Path
    weights: Path
    report: Path
    curve: Path
    picture: Path

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy of a classifier's last validation, in per cent."""
        return self.metrics['top1']


def train(
    config: Path | str,
    work_dir: Path | str | None = None,
    resume: bool = False,
    cfg_options: dict | None = None,
    preflight: bool = True,
    strict: bool = False,
) -> TrainResult:
    """Train a classifier, a detector or a segmentor. Under torchrun, every process calls this and has the result.

    Args:
        config: path of an mmengine config, or name of one that comes with the zoo ('quickstart/biformer_digits').
        work_dir: folder for the run's files; the config's, or work_dirs/<name>, if None.
        resume: go on from the folder's newest whole checkpoint, to the same weights as without the interruption. A
            restart by torchrun does so in any case.
        cfg_options: values in place of the config's, by dotted name.
        preflight: whether to compare what the run would do with what its config says before it begins; a run that
            goes on isn't compared again.
        strict: whether what the preflight warns of is an error.

    Raises:
        FileNotFoundError: no such config.
        FileExistsError: the folder has checkpoints of another run, and resume is false.
        ConfigError: what the config asks for can't be made, or doesn't fit the data: a ValueError with all problems.
        PreflightError: the run would not do what its config says: a ValueError with what the preflight has found.
        ValueError: a checkpoint to resume from is of other data or another batch, or none is whole.
        CheckpointWriteError: the disk is full, or the folder can't be written to.
        Preempted: SIGTERM or SIGUSR1 has stopped the run, after a checkpoint; uncaught, the exit status is PREEMPTED.
    """
    # torchrun shows the traceback that `record` writes down, of the process that failed first.
    run = record(_train) if distributed.is_launched() else _train
    return run(config, work_dir, resume, cfg_options, preflight, strict)


def _train(config, work_dir, resume: bool, cfg_options: dict | None, preflight: bool, strict: bool) -> TrainResult:
    cfg = load_config(config, cfg_options)
    cfg.work_dir = str(work_dir or cfg.work_dir)
    with distributed.process_group() as launcher:
        distributed.on_first(validate, cfg, True, get_world_size())
        if preflight and distributed.on_first(checkpoints.latest, cfg.work_dir) is None:
            _preflight(cfg, strict)
        cfg.resume = resume
        cfg.launcher = launcher
        # mmengine gives runs of one name one state.
        cfg.experiment_name = f'{Path(cfg.work_dir).name}_{uuid.uuid4().hex}'
        runner = Runner.from_cfg(fit(cfg, get_world_size()))
        try:
            runner.train()
        except Preempted as stop:
            if is_main_process():
                print(stop, file=sys.stderr)
            raise
        finally:
            for hook in runner.hooks:
                if isinstance(hook, ProgressBar):
                    hook.close()
        return _result(Path(runner.work_dir), runner.exported)


def _preflight(cfg: Config, strict: bool) -> None:
    """Show and keep what a preflight finds; PreflightError if the run is not to begin."""
    report = rehearse(cfg, strict=strict)

    def keep() -> None:
        folder = Path(cfg.work_dir)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints.write_atomically(folder / 'preflight.json', lambda path: path.write_text(report.to_json() + '\n'))
        Console().print(report.render(only_problems=True))

    distributed.on_first(keep)
    report.require()


def _result(folder: Path, exported: str) -> TrainResult:
    checkpoint, weights = checkpoints.latest(folder), folder / 'model.safetensors'
    distributed.on_first(checkpoints.export_weights, checkpoint, weights, exported)
    validations = [record for record in read_curve(folder / 'curve.jsonl') if 'loss' not in record]
    metrics = {key: value for key, value in validations[-1].items() if key not in ('iter', 'epoch')}
    return TrainResult(
        metrics=metrics,
        work_dir=folder,
        checkpoint=checkpoint,
        best=folder / 'best.pth',
        weights=weights,
        report=distributed.on_first(write_report, folder),
        curve=folder / 'curve.jsonl',
        picture=folder / 'curve.png',
    )
