"""The first thing to run: train BiFormer on real digits in minutes, and see what it does."""

import shutil
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from . import pictures
from .config import load_config
from .data import LabelledImages
from .registry import DATASETS
from .run import TrainResult, train
from .tasks import create_backbone

__all__ = ['main']

CONFIG = 'quickstart/biformer_digits'
REQUIRED_ACCURACY = 98.5  # per cent of the 597 test images
QUERY = (0.45, 0.45)  # the place whose routes are drawn, as (y, x) in 0..1: on the stroke of most digits


def main() -> int:
    """Write the data, train, draw the pictures and say what came out: 0, or 1 if the accuracy is too low."""
    torch.set_num_threads(1)  # one order of summation, so the same result each time, on a busy machine too
    console = Console()
    cfg = load_config(CONFIG)
    shutil.rmtree(cfg.work_dir, ignore_errors=True)  # of an earlier quickstart
    console.print(f'Training {cfg.model.backbone.name} on handwritten digits ({CONFIG}) …', highlight=False)
    start = time.perf_counter()
    result = train(CONFIG)
    seconds = time.perf_counter() - start

    model = _trained_model(cfg, result)
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    drawn = _draw(model, dataset, result.work_dir)
    _report(console, cfg, result, drawn, _pyramid(cfg, model, dataset), seconds)
    if result.accuracy < REQUIRED_ACCURACY:
        console.print(f'[bold red]FAILED: top-1 is {result.accuracy:.2f} %, expected {REQUIRED_ACCURACY} % or more.')
        return 1
    return 0


def _trained_model(cfg, result: TrainResult) -> nn.Module:
    """The model from the weights that anyone can load: nothing of the training run is left in it."""
    return create_backbone(**cfg.model.backbone, checkpoint_path=str(result.weights)).eval()


def _normalized(model: nn.Module, images: Tensor) -> Tensor:
    """Floats that the model expects, of images as bytes (B, C, H, W)."""
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    return (images / 255 - mean) / std


def _batch(model: nn.Module, dataset: LabelledImages, indices) -> Tensor:
    return _normalized(model, torch.stack([dataset[i][0] for i in indices]))


@torch.no_grad()
def _draw(model: nn.Module, dataset: LabelledImages, folder: Path) -> dict[str, Path]:
    """Draw the predictions and one image's routes; the files by what they show."""
    parts = torch.arange(len(dataset)).split(100)
    predictions = torch.cat([model(_batch(model, dataset, part.tolist())).argmax(dim=1) for part in parts]).tolist()
    images, labels = zip(*(dataset.read(i) for i in range(len(dataset))), strict=True)
    grid, routes = folder / 'predictions.png', folder / 'routes.png'
    pictures.prediction_grid(images, labels, predictions, dataset.metainfo['classes'], grid)
    pictures.routed_regions(images[0], model.routes(_batch(model, dataset, [0])), QUERY, routes)
    return {'predictions, wrong ones first': grid, 'regions that a region attends to': routes}


@torch.no_grad()
def _pyramid(cfg, model: nn.Module, dataset: LabelledImages) -> list[tuple[str, int, tuple[int, ...]]]:
    """Name, stride and shape of each feature map of one image."""
    features = create_backbone(**cfg.model.backbone, features_only=True).eval()
    features.model.load_state_dict(model.state_dict(), strict=False)  # it has no head
    info = features.feature_info
    maps = features(_batch(model, dataset, [0]))
    return [
        (name, stride, tuple(x.shape))
        for name, stride, x in zip(info.module_name(), info.reduction(), maps, strict=True)
    ]


def _report(console: Console, cfg, result: TrainResult, drawn: dict[str, Path], pyramid, seconds: float) -> None:
    reached = Table('measure', 'of 597 test images', title='Accuracy', title_justify='left')
    for measure, value in result.metrics.items():
        reached.add_row(measure, f'{value:.2f} %')
    maps = Table('stage', 'stride', 'shape (B, C, H, W)', title='Feature pyramid of one image', title_justify='left')
    for name, stride, shape in pyramid:
        maps.add_row(name, str(stride), str(shape))
    files = Table('what', 'file', title=f'In {_shown(result.work_dir)}/', title_justify='left')
    named = {'training curve': result.picture, **drawn, 'weights': result.weights, 'checkpoint': result.checkpoint}
    for what, path in named.items():
        files.add_row(what, path.name)
    console.print(reached, maps, files)

    arguments = ', '.join(f'{key}={value}' for key, value in cfg.model.backbone.items() if key != 'name')
    next_steps = (
        f'the same by hand   zoo train {CONFIG} --work-dir work_dirs/mine',
        'other models       zoo list',
        'from Python        import timm, zoo',
        f"                   timm.create_model('{cfg.model.backbone.name}', {arguments},",
        f"                                     checkpoint_path='{_shown(result.weights)}')",
    )
    console.print(f'\nTrained {cfg.train_cfg.max_epochs} epochs in {seconds:.0f} s. What to try next:', highlight=False)
    console.print(*next_steps, sep='\n', soft_wrap=True, highlight=False)


def _shown(path: Path) -> str:
    """The path as one would type it here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


if __name__ == '__main__':
    sys.exit(main())
