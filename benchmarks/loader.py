"""What bounds a run: images a second of its loader alone, of its model alone, and of both together.

    python -m benchmarks.loader imagenet/van/van_b0 --workers 4 8 16     # a config, by path or name
    python -m benchmarks.loader CONFIG --cfg-options train_dataloader.dataset.root=/data/imagenet
    python -m benchmarks.loader --model nat_mini --data /data/imagenet   # root/train/class name/*.jpg
    python -m benchmarks.loader --model test_vit --size 160              # scikit-learn's photographs

Builds what one process of the run would: its dataset with all augmentation, the loader, the model, the optimizer. The
loader alone counts batches as they come; the model alone makes training steps on one batch that is on the device
already; both are the run itself, without hooks. Wall time, each for --seconds, after the workers have filled their
queues. A loader that is not well above the model keeps it waiting: more workers, smaller files or a machine with more
cores per GPU help; where the model's own process works on the CPU, it takes cores from the workers.

With --model, images are augmented as in the usual recipes: RandomResizedCrop, flip, RandAugment. Writes nothing unless
--json names a file, to which the figures are added as {name: report}.
"""

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from zoo.benchmarks.timing import machine
from zoo.train.config import load_config
from zoo.train.registry import MODELS
from zoo.train.runner import Runner

PHOTOGRAPHS = 32  # files of 500x375, about ImageNet's mean size
ENOUGH = 1.1  # times the model's rate, for the loader not to bound it


def write_photographs(folder: Path) -> None:
    """Crops of scikit-learn's two photographs, as JPEG files of 500x375 in folder/train/<class>/."""
    from sklearn.datasets import load_sample_images

    for label, photograph in enumerate(load_sample_images().images):
        path = folder / 'train' / str(label)
        path.mkdir(parents=True)
        image = Image.fromarray(photograph)  # 640x427
        for i in range(PHOTOGRAPHS // 2):
            left, top = 8 * i, 3 * i
            image.crop((left, top, left + 500, top + 375)).save(path / f'{i}.jpg', quality=90)


def config_of(model: str, data: Path, size: int, batch: int) -> Config:
    """A config of a timm model on an image folder with the usual augmentation."""
    transform = {'input_size': (3, size, size), 'is_training': True, 'auto_augment': 'rand-m9-inc1'}
    classes = sum(path.is_dir() for path in (data / 'train').iterdir())
    return Config(
        {
            'model': {
                'type': 'ImageClassifier',
                'backbone': {'name': model, 'num_classes': classes},
                'loss': {'type': 'cross_entropy'},
            },
            'optim_wrapper': {
                'type': 'OptimWrapper',
                'constructor': 'TimmParamGroups',
                'optimizer': {'type': 'AdamW', 'lr': 1e-3, 'weight_decay': 0.05},
            },
            'train_dataloader': {
                'dataset': {
                    'type': 'LabelledImages',
                    'root': str(data),
                    'split': 'train',
                    'transform': {'type': 'timm_transform', **transform, 'interpolation': 'bicubic'},
                },
                'sampler': {'type': 'ShuffledStream'},
                'collate_fn': {'type': 'default_collate'},
                'batch_size': batch,
                'num_workers': 0,
                'drop_last': True,
            },
        }
    )


def _loader(cfg: Config, workers: int):
    settings = cfg.train_dataloader.copy()
    settings.num_workers = workers
    if not workers:
        for key in ('persistent_workers', 'prefetch_factor'):
            settings.pop(key, None)
    return Runner.build_dataloader(settings, seed=0)


def _rate(step: Callable[[], object], images: int, seconds: float, warmup: int, wait: Callable[[], None]) -> float:
    """Images a second of a step, in at least `seconds` and three steps, after `warmup` others."""
    for _ in range(warmup):
        step()
    wait()
    start = time.perf_counter()
    for done in itertools.count(1):
        step()
        if done >= 3 and time.perf_counter() - start >= seconds:
            wait()
            return done * images / (time.perf_counter() - start)


def measure(
    cfg: Config, workers: Sequence[int], seconds: float = 10, device: str = 'cpu', progress: Progress | None = None
) -> dict:
    """Images a second of one process.

    Args:
        cfg: of a run; its model, optim_wrapper and train_dataloader are built.
        workers: numbers of loader workers to try.
        seconds: of each measurement.
        device: of the model.
        progress: to show the measurements on.

    Returns:
        {'machine', 'setting', 'model': rate, 'workers': {number: {'loader': rate, 'both': rate}}}.
    """
    progress = progress or Progress(disable=True)
    task = progress.add_task('model', total=1 + 2 * len(workers))
    MMLogger.get_current_instance().setLevel('ERROR')  # it warns at each build in a scope without a package
    with DefaultScope.overwrite_default_scope('zoo'):
        return _measure(cfg, workers, seconds, device, progress, task)


def _measure(cfg, workers, seconds, device, progress, task) -> dict:
    batch = cfg.train_dataloader.batch_size
    model = MODELS.build(cfg.model).to(device).train()
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper.copy())
    wait = torch.cuda.synchronize if device == 'cuda' else lambda: None

    def train(data) -> None:
        model.train_step(data, optim_wrapper=optim_wrapper)

    batches = iter(_loader(cfg, 0))
    images, labels = next(batches)
    del batches
    resident = images.to(device), labels.to(device)
    report = {
        'machine': machine(),
        'setting': {
            'model': cfg.model.backbone.name,
            'image': list(images.shape[1:]),
            'batch': batch,
            'seconds': seconds,
            'device': device,
            'threads': torch.get_num_threads(),
        },
        'model': _rate(lambda: train(resident), batch, seconds, 2, wait),
        'workers': {},
    }
    progress.advance(task)
    for number in workers:
        found = report['workers'][str(number)] = {}
        for what in ('loader', 'both'):
            progress.update(task, description=f'{what}, {number} workers')
            loader = _loader(cfg, number)
            batches = iter(loader)
            # What workers prepared while they started is not their rate.
            warmup = 2 + 2 * number * (loader.prefetch_factor or 0)

            def step(batches=batches, what=what) -> None:
                data = next(batches)
                if what == 'both':
                    train(data)

            found[what] = _rate(step, batch, seconds, warmup, wait)
            del batches, step
            progress.advance(task)
    return report


def verdict(report: dict) -> str:
    """What bounds the run, in a sentence."""
    model = report['model']
    number, best = max(report['workers'].items(), key=lambda item: item[1]['both'])
    reached = f'With {number} workers a run reaches {best["both"]:,.0f} images/s'
    if best['loader'] >= ENOUGH * model:
        bound = f'The model bounds it, at {model:,.0f}; the loader alone gives {best["loader"]:,.0f}.'
        if best['both'] < 0.9 * model:
            bound = f'The loader ({best["loader"]:,.0f} alone) and the model ({model:,.0f}) share the processor.'
    else:
        bound = f'The loader bounds it, at {best["loader"]:,.0f} alone; the model alone makes {model:,.0f}.'
        if int(number):
            needed = ENOUGH * model / best['loader'] * int(number)
            bound += f' At that rate a worker it would take some {needed:,.0f} workers, a core each.'
    return f'{reached}. {bound}'


def rows(report: dict) -> list[list[str]]:
    """Workers, images a second of the loader alone, of both, and the part of the model's own rate."""
    return [
        [number, f'{rates["loader"]:,.1f}', f'{rates["both"]:,.1f}', f'{rates["both"] / report["model"]:.0%}']
        for number, rates in report['workers'].items()
    ]


COLUMNS = ('workers', 'loader alone, images/s', 'both, images/s', 'of the model alone')


def table(name: str, report: dict) -> Table:
    setting = report['setting']
    device = f'CPU, {setting["threads"]} threads' if setting['device'] == 'cpu' else report['machine']['accelerator']
    title = (
        f'{name}: {setting["model"]}, batch {setting["batch"]} of {"x".join(map(str, setting["image"]))}, {device}; '
    )
    result = Table(*COLUMNS, title=f'{title}model alone {report["model"]:,.1f} images/s')
    for line in rows(report):
        result.add_row(*line)
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', nargs='?', help='a config file, or a shipped one such as quickstart/biformer_digits')
    parser.add_argument('--model', help='a timm model, instead of a config')
    parser.add_argument('--data', type=Path, help="folder with train/<class>/, for --model; scikit-learn's photographs")
    parser.add_argument('--size', type=int, default=224, help='of the images, with --model')
    parser.add_argument('--batch', type=int, help="images in a batch; the config's, or 32")
    parser.add_argument('--workers', type=int, nargs='+', help="numbers of workers to try; the config's, or 0 1 2")
    parser.add_argument('--cfg-options', action='append', default=[], metavar='KEY=VALUE', help='repeatable')
    parser.add_argument('--seconds', type=float, default=10, help='of each measurement')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--json', type=Path, help='file of {name: report} to add to')
    args = parser.parse_args(arguments)
    if (args.config is None) == (args.model is None):
        parser.error('give a config, or --model NAME')
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('there is no CUDA GPU here')
    if any('=' not in option for option in args.cfg_options):
        parser.error(f'--cfg-options takes key=value, got {args.cfg_options}')
    with tempfile.TemporaryDirectory() as folder:
        try:
            if args.config:
                cfg = load_config(args.config, dict(option.split('=', 1) for option in args.cfg_options))
                cfg.train_dataloader.batch_size = args.batch or cfg.train_dataloader.batch_size
                workers = args.workers or [cfg.train_dataloader.get('num_workers', 0)]
            else:
                data = args.data or Path(folder, 'photographs')
                if args.data is None:
                    write_photographs(data)
                elif not (data / 'train').is_dir():
                    raise FileNotFoundError(f'{data.absolute()} has no folder train.')
                cfg = config_of(args.model, data, args.size, args.batch or 32)
                workers = args.workers or [0, 1, 2]
            with Progress(transient=True) as progress:
                report = measure(cfg, workers, args.seconds, args.device, progress)
        except (OSError, ValueError, ImportError) as error:
            parser.error(str(error))
    name = args.config or f'{args.model} on {args.data or "photographs"}'
    console = Console()
    console.print(table(name, report))
    console.print(verdict(report))
    if args.json:
        reports = json.loads(args.json.read_text()) if args.json.exists() else {}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(reports | {name: report}, indent=2) + '\n')
        console.print('written to', str(args.json))


if __name__ == '__main__':
    main()
