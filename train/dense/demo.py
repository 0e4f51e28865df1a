"""Detection and segmentation in minutes: real digits pasted into drawn scenes, whose truth is exact.

It shows that data, training, evaluation and pictures work together. It says nothing of COCO or ADE20K.
"""

import shutil
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ..config import load_config
from ..run import TrainResult, train

__all__ = ['REQUIRED', 'main']

REQUIRED = {  # config: measure, and what it has to reach on the 200 test scenes, in per cent
    'dense_demo/mask_rcnn_van_b0': ('segm_AP50', 80.0),
    'dense_demo/upernet_van_b0': ('mIoU', 75.0),
}


def main() -> int:
    """Write the scenes, train both, and say what came out: 0, or 1 if a measure is too low."""
    torch.set_num_threads(1)  # one order of summation, so the same result each time, on a busy machine too
    console = Console()
    failed = []
    for config, (measure, required) in REQUIRED.items():
        cfg = load_config(config)
        shutil.rmtree(cfg.work_dir, ignore_errors=True)  # of an earlier demonstration
        console.print(f'Training {cfg.model.head.type} on {cfg.model.backbone.name} ({config}) …', highlight=False)
        start = time.perf_counter()
        result = train(config)
        _report(console, result, time.perf_counter() - start)
        if result.metrics[measure] < required:
            failed.append(f'{config}: {measure} is {result.metrics[measure]:.2f} %, expected {required} % or more.')
    for line in failed:
        console.print(f'[bold red]FAILED: {line}')
    return 1 if failed else 0


def _report(console: Console, result: TrainResult, seconds: float) -> None:
    reached = Table('measure', 'of 200 test scenes', title=f'Trained in {seconds:.0f} s', title_justify='left')
    for measure, value in result.metrics.items():
        reached.add_row(measure, f'{value:.2f} %')
    files = Table('what', 'file', title=f'In {_shown(result.work_dir)}/', title_justify='left')
    for what, name in (('predictions beside truth', 'predictions.png'), ('training curve', result.picture.name)):
        files.add_row(what, name)
    files.add_row('weights', result.weights.name)
    console.print(reached, files)


def _shown(path: Path) -> str:
    """The path as one would type it here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


if __name__ == '__main__':
    sys.exit(main())
