"""Dense prediction: what data and post-processing take of a step, and the memory of a Mask R-CNN step by backbone.

    python -m benchmarks.dense                               # an hour and more: a step takes half a minute
    python -m benchmarks.dense nat_mini --only memory
    python -m benchmarks.dense van_b0 --size 667 400 --crop 256 --rounds 1

Models, transforms and optimizers are those of configs/coco and configs/ade20k; a backbone that has no config there
stands in the base config. Weights are untrained and files are generated, for lack of others: JPEGs of smooth colours
with noise, seven polygons of 24 points each (COCO's mean is 7.3 objects), and PNGs of 150 classes in patches. Stored
images are somewhat larger than what detectors train on, 1440x864 for 1333x800, so that each stage has work to do;
COCO's own have a third of the pixels.

Steps: process time with one thread of torch, each part of the same step. Data are decoding, masks of polygons,
transforms, collation, normalization and padding; post-processing is NMS, of proposals too, masks and classes in the
image's pixels, and what the measure does with them, run lengths of masks among it. All else is the model: backbone,
neck, heads, losses with their matching, backward pass, optimizer. An untrained Mask R-CNN finds nothing, so here each
class of each proposal counts as found: NMS goes through 80 boxes a proposal, and a hundred masks come out.

Memory: how far it rises above what holds weights and images, at the peak of a step without the optimizer, of a batch of
one image in float32: activations, and gradients, those of the parameters among them. On the CPU in a fresh process.
`held` is what weights and AdamW's state take beside it. A backbone that doesn't fit is listed without a figure; `ulimit
-d` sets how much may be taken. With --device cuda memory alone is measured.

Writes results/dense.json beside this file, or the file that --json names, after each measurement. Figures are added to
those of the same setting and machine that are there.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from importlib import resources
from pathlib import Path
from unittest.mock import patch

import numpy as np
import timm
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from zoo.benchmarks.timing import machine, peak_memory
from zoo.train.config import config_names, load_config
from zoo.train.dense import coco, detectors
from zoo.train.dense.task import collate
from zoo.train.registry import DATASETS, METRICS, MODELS

RESULTS = Path(__file__).parent / 'results'
TIMED = ('van_b0', 'nat_mini', 'shvit_s4')
MEASURED = (
    'resnet50',
    'biformer_tiny',
    'crossformer_small',
    'dinat_mini',
    'maxvit_tiny',
    'nat_mini',
    'shvit_s4',
    'transnext_micro',
    'van_b0',
    'van_b2',
)
BATCH = {'mask_rcnn': 1, 'upernet': 2}  # a BatchNorm of UPerNet's 1x1 map needs two images
TITLES = {'mask_rcnn': 'Mask R-CNN', 'upernet': 'UPerNet'}
STRIDES = (4, 8, 16, 32, 64)
OBJECTS, POINTS = 7, 24
LARGER = 1.08  # sides of stored images, in those that detectors train on
MODEL = 'model'


def write_images(folder: Path, count: int, size: Sequence[int]) -> None:
    """JPEG files folder/<i>.jpg of smooth colours with noise, some 1.5 bits a pixel; `size` is width and height."""
    folder.mkdir(parents=True)
    for i in range(count):
        numbers = np.random.default_rng(i)
        small = Image.fromarray(numbers.integers(256, size=(12, 20, 3), dtype=np.uint8))
        smooth = np.asarray(small.resize(size, Image.Resampling.BICUBIC))
        noisy = (smooth + numbers.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f'{i}.jpg', quality=90)


def write_objects(path: Path, count: int, size: Sequence[int], classes: int) -> None:
    """A COCO file of OBJECTS polygons of POINTS points in each of the images of `write_images`."""
    images, annotations = [], []
    for i in range(count):
        numbers = np.random.default_rng(i)
        images.append({'id': i, 'file_name': f'{i}.jpg', 'width': size[0], 'height': size[1]})
        for _ in range(OBJECTS):
            radius = numbers.uniform(1 / 20, 1 / 4) * min(size)
            centre = numbers.uniform(radius, np.array(size) - radius)
            angles = np.linspace(0, 2 * np.pi, POINTS, endpoint=False)
            rays = radius * numbers.uniform(0.5, 1, (POINTS, 1))
            points = centre + rays * np.stack([np.cos(angles), np.sin(angles)], axis=1)
            corner, extent = points.min(axis=0), np.ptp(points, axis=0)
            annotations.append(
                {
                    'id': len(annotations) + 1,
                    'image_id': i,
                    'category_id': 1 + int(numbers.integers(classes)),
                    'iscrowd': 0,
                    'bbox': [*corner.tolist(), *extent.tolist()],
                    'area': float(extent.prod()),
                    'segmentation': [points.flatten().tolist()],
                }
            )
    categories = [{'id': 1 + label, 'name': str(label)} for label in range(classes)]
    path.write_text(json.dumps({'images': images, 'annotations': annotations, 'categories': categories}))


def write_maps(folder: Path, count: int, size: Sequence[int], values: int) -> None:
    """PNG files folder/<i>.png of 12 x 16 patches of values below `values`; `size` is width and height."""
    folder.mkdir(parents=True)
    for i in range(count):
        patches = np.random.default_rng(i).integers(values, size=(12, 16), dtype=np.uint8)
        Image.fromarray(patches).resize(size, Image.Resampling.NEAREST).save(folder / f'{i}.png')


def _config(task: str, backbone: str) -> Config:
    base = load_config(Path(str(resources.files('zoo.configs'))) / '_base_' / f'{task}.py')
    data, end = ('coco' if task == 'mask_rcnn' else 'ade20k'), f'/{task}_{backbone}'
    own = [name for name in config_names() if name.startswith(f'{data}/') and name.endswith(end)]
    if own:
        base.model = load_config(own[0]).model
    else:
        base.model.backbone = {'name': backbone}
        if task == 'mask_rcnn':
            base.model.neck.update(strides=STRIDES, extra_levels=0)
    return base


class Case:
    """A model with its data, in the folder that they are written to, for batches and steps of either kind.

    Args:
        task: 'mask_rcnn' or 'upernet'.
        backbone: a name that timm knows.
        folder: for the files; what is there already is used.
        size: long and short side of what a detector trains on, or side of a segmentor's crop.
        count: of files.
        device: of the model.
    """

    def __init__(self, task: str, backbone: str, folder: Path, size, count: int, device: str = 'cpu'):
        torch.manual_seed(0)
        self.batch_size = BATCH[task]
        cfg = _config(task, backbone)
        write = self._detection if task == 'mask_rcnn' else self._segmentation
        write(cfg, folder / task, size, count)
        MMLogger.get_current_instance().setLevel('ERROR')  # it warns at each build in a scope without a package
        with DefaultScope.overwrite_default_scope('zoo'):
            self.datasets = {'train': DATASETS.build(cfg.train_dataloader.dataset)}
            self.datasets['test'] = DATASETS.build(cfg.val_dataloader.dataset)
            self.model = MODELS.build(cfg.model).to(device)
            self.optim_wrapper = build_optim_wrapper(self.model, cfg.optim_wrapper.copy())
            self.metric = METRICS.build(cfg.val_evaluator)
        self.metric.dataset_meta = self.datasets['test'].metainfo

    def _detection(self, cfg: Config, folder: Path, size: Sequence[int], count: int) -> None:
        stored = [round(LARGER * side) for side in size]
        if not folder.exists():
            write_images(folder, count, stored)
            write_objects(folder / 'annotations.json', count, stored, cfg.model.head.num_classes)
        for loader in (cfg.train_dataloader, cfg.val_dataloader):
            loader.dataset.update(root=str(folder), annotations=str(folder / 'annotations.json'))
        cfg.train_dataloader.dataset.transform[0].scale = tuple(size)
        cfg.model.test = {'resize': (min(size), max(size)), 'score_threshold': 0.0}

    def _segmentation(self, cfg: Config, folder: Path, size: int, count: int) -> None:
        stored = [4 * size // 3, size]  # as most of ADE20K's are after the resize
        if not folder.exists():
            for split in ('training', 'validation'):
                write_images(folder / 'images' / split, count, stored)
                write_maps(folder / 'annotations' / split, count, stored, 1 + cfg.model.head.num_classes)
        for loader in (cfg.train_dataloader, cfg.val_dataloader):
            loader.dataset.root = str(folder)
        limits = 4 * size, size
        for step in cfg.train_dataloader.dataset.transform:
            if step.type == 'RandomResizeRatio':
                step.scale = limits
            elif 'size' in step:
                step.size = size
        cfg.model.test = {**cfg.model.get('test', {}), 'resize': limits}

    def batch(self, number: int) -> tuple[list, list]:
        """Training images and targets, of files that follow each other."""
        dataset = self.datasets['train']
        first = number * self.batch_size
        return collate([dataset[(i % len(dataset), (0, i))] for i in range(first, first + self.batch_size)])

    def train(self, number: int) -> None:
        self.model.train().train_step(self.batch(number), optim_wrapper=self.optim_wrapper)

    @torch.no_grad()
    def test(self, number: int) -> None:
        data = collate([self.datasets['test'][number % len(self.datasets['test'])]])
        self.metric.process(data, self.model.eval().val_step(data))
        self.metric.results.clear()

    def parts(self, kind: str) -> list[tuple[object, str, str]]:
        """What to time of a step of a kind: owner and name of a function, and the part that its time is of."""
        dataset, model = self.datasets[kind], self.model
        parts = [(dataset, 'read', 'decode'), (dataset, 'finish', 'transforms'), (model, 'batch', 'normalize, pad')]
        if isinstance(model, detectors.Detector):
            parts += [(coco, 'decode_masks', 'masks of polygons')]
            parts += [(model.head.rpn, 'filter_proposals', 'NMS of proposals')]
            parts += [(detectors, 'checked_targets', 'normalize, pad')] if kind == 'train' else []
        elif kind == 'train':
            parts += [(model, 'batch_masks', 'normalize, pad')]
        if kind == 'test':
            parts += [(self.metric, 'process', 'measure')]
            if isinstance(model, detectors.Detector):
                parts += [(model, 'resize', 'transforms'), (model.head.roi_heads, 'select', 'NMS of classes')]
                parts += [(detectors, 'paste_masks', 'masks in the image')]
            else:
                parts += [(model, 'predict', 'resize, probabilities, classes'), (model, 'logits', MODEL)]
        return parts


class Stopwatch:
    """Process time of parts of a call; that of a part within another is not the other's too."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)

    def _switch(self, part: str) -> str:
        now, before = time.process_time(), self.part
        self.seconds[before] += now - self.since
        self.part, self.since = part, now
        return before

    def _timed(self, function: Callable, part: str) -> Callable:
        def call(*args, **kwargs):
            before = self._switch(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._switch(before)

        return call

    @contextmanager
    def running(self, parts: Sequence[tuple[object, str, str]]) -> Iterator[None]:
        """Takes the time of functions, by part; of all else, that of MODEL."""
        with ExitStack() as stack:
            for owner, name, part in parts:
                stack.enter_context(patch.object(owner, name, self._timed(getattr(owner, name), part)))
            self.part, self.since = MODEL, time.process_time()
            yield
            self._switch(MODEL)


def time_steps(case: Case, kind: str, rounds: int, advance: Callable[[], None] = lambda: None) -> dict:
    """Seconds of the parts of a step, medians of `rounds` after one for warm-up.

    Args:
        case: model and data.
        kind: 'train' or 'test'.
        rounds: to measure.
        advance: called after each step.

    Returns:
        {'parts': {part: seconds}, 'share': of all that isn't the model, 'shares': that of each round}.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = []
    try:
        for number in range(1 + rounds):
            watch = Stopwatch()
            with watch.running(case.parts(kind)):
                (case.train if kind == 'train' else case.test)(number)
            found.append(watch.seconds)
            advance()
    finally:
        torch.set_num_threads(threads)
    del found[0]
    shares = [1 - seconds[MODEL] / sum(seconds.values()) for seconds in found]
    medians = {part: statistics.median(seconds[part] for seconds in found) for part in found[0]}
    return {'parts': medians, 'share': statistics.median(shares), 'shares': shares}


def peak_of_step(backbone: str, folder: Path, size: Sequence[int], device: str) -> dict:
    """Bytes of a Mask R-CNN step by its backbone, for a process of its own: {'peak', 'held', 'parameters'}."""
    torch.set_num_threads(1)
    case = Case('mask_rcnn', backbone, folder, size, 1, device)
    model = case.model.train()
    images, targets = model.data_preprocessor(case.batch(0), True)

    def step() -> None:
        model.parse_losses(model(images, targets, mode='loss'))[0].backward()

    if device == 'cuda':
        step()  # tunes
        model.zero_grad()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {'peak': peak_memory(step, device), 'held': 3 * 4 * parameters, 'parameters': parameters}


def _fresh(function: Callable, *arguments) -> dict:
    """What it returns in a new process; without enough memory, {'peak': None, 'reason': ...}."""
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            return {'peak': None, 'reason': 'the process was ended, as one is for want of memory'}
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and 'memory' not in str(error):
                raise
            return {'peak': None, 'reason': f'not enough memory: {error}'.splitlines()[0]}


def measure(
    timed: Sequence[str],
    measured: Sequence[str],
    size: Sequence[int] = (1333, 800),
    crop: int = 512,
    rounds: int = 3,
    device: str = 'cpu',
    progress: Progress | None = None,
    tasks: Sequence[str] = ('mask_rcnn', 'upernet'),
) -> Iterator[dict]:
    """The report as it grows, after each model.

    Args:
        timed: backbones to take the time of steps with.
        measured: backbones to take the memory of a Mask R-CNN step of.
        size: long and short side of a detector's images.
        crop: side of a segmentor's.
        rounds: steps of each kind, after one for warm-up.
        device: of the memory.
        progress: to show the measurements on.
        tasks: to take the time of.

    Yields:
        {'machine', 'setting', 'steps': {task: {backbone: {'train', 'test': see `time_steps`}}}, 'memory': {backbone:
        see `peak_of_step`}}.
    """
    progress = progress or Progress(disable=True)
    setting = {'size': list(size), 'crop': crop, 'rounds': rounds, 'device': device, 'threads': 1}
    report = {'machine': machine(), 'setting': setting, 'steps': {}, 'memory': {}}
    done = progress.add_task('', total=len(timed) * len(tasks) * 2 * (1 + rounds) + len(measured))
    with tempfile.TemporaryDirectory() as folder:
        for task in tasks:
            for name in timed:
                count = BATCH[task] * (1 + rounds)
                case = Case(task, name, Path(folder, 'timed'), size if task == 'mask_rcnn' else crop, count)
                found = {}
                for kind in ('train', 'test'):
                    progress.update(done, description=f'{task} of {name}, {kind}')
                    found[kind] = time_steps(case, kind, rounds, lambda: progress.advance(done))
                report['steps'].setdefault(task, {})[name] = found
                yield report
        for name in measured:
            progress.update(done, description=f'memory of {name}')
            report['memory'][name] = _fresh(peak_of_step, name, Path(folder, 'measured'), size, device)
            progress.advance(done)
            yield report


def merged(report: dict, path: Path) -> dict:
    """The report with the figures of a file's, if that is of the same setting and machine."""
    old = json.loads(path.read_text()) if path.exists() else {}

    def place(found: dict) -> tuple:
        return found.get('setting'), {key: own for key, own in found.get('machine', {}).items() if key != 'date'}

    if place(old) != place(report):
        return report
    steps = {
        task: old['steps'].get(task, {}) | report['steps'].get(task, {}) for task in {**old['steps'], **report['steps']}
    }
    return {**report, 'steps': steps, 'memory': old['memory'] | report['memory']}


STEP_COLUMNS = ('model', 'step', 'model, s', 'all else, ms', 'share', 'of it, ms')
MEMORY_COLUMNS = ('backbone', 'peak, MiB', 'x', 'held, MiB', 'parameters, M')


def step_rows(report: dict) -> list[list[str]]:
    """What a table shows of each kind of step: its parts, the dearest first."""
    lines = []
    for task, models in report['steps'].items():
        for name, kinds in models.items():
            for kind, found in kinds.items():
                parts = {part: seconds for part, seconds in found['parts'].items() if part != MODEL}
                dearest = sorted(parts.items(), key=lambda item: -item[1])
                lines.append(
                    [
                        f'{TITLES[task]}, {name}',
                        kind,
                        f'{found["parts"][MODEL]:.2f}',
                        f'{1e3 * sum(parts.values()):.0f}',
                        f'{found["share"]:.1%}',
                        ', '.join(f'{part} {1e3 * seconds:.0f}' for part, seconds in dearest),
                    ]
                )
    return lines


def memory_rows(report: dict) -> list[list[str]]:
    """What a table shows of each backbone's memory; x is the multiple of resnet50's peak."""
    reference = report['memory'].get('resnet50', {}).get('peak')
    lines = []
    for name, found in report['memory'].items():
        if found['peak'] is None:
            lines.append([name, 'does not fit', '', '', ''])
            continue
        times = f'{found["peak"] / reference:.2f}' if reference else ''
        peak, held = (f'{found[key] / 2**20:,.0f}' for key in ('peak', 'held'))
        lines.append([name, peak, times, held, f'{found["parameters"] / 1e6:.1f}'])
    return lines


def tables(report: dict) -> list[Table]:
    setting = report['setting']
    long, short = setting['size']
    place = 'CPU' if setting['device'] == 'cpu' else report['machine']['accelerator']
    result = []
    for title, columns, lines in (
        (f'{long}x{short}, crops of {setting["crop"]}: CPU, one thread', STEP_COLUMNS, step_rows(report)),
        (f'A Mask R-CNN step at {long}x{short}, batch 1: {place}', MEMORY_COLUMNS, memory_rows(report)),
    ):
        if lines:
            result.append(Table(*columns, title=title))
            for line in lines:
                result[-1].add_row(*line)
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', metavar='NAME', help='backbones; one of each family if none are given')
    parser.add_argument('--size', type=int, nargs=2, default=(1333, 800), help="sides of detectors' images")
    parser.add_argument('--crop', type=int, default=512, help="side of segmentors' images")
    parser.add_argument('--rounds', type=int, default=3, help='steps of each kind')
    parser.add_argument('--only', choices=('mask_rcnn', 'upernet', 'memory'), help='measure no more than this')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu', help='of the memory')
    parser.add_argument('--json', type=Path, help='file of the report')
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.names if not timm.is_model(name)]:
        parser.error(f'timm knows no model called {", ".join(unknown)}')
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('there is no CUDA GPU here')
    if min(*args.size, args.crop) < 32 or args.rounds < 1:
        parser.error('--size and --crop must be at least 32, --rounds 1')
    path = args.json or RESULTS / f'dense{"" if args.device == "cpu" else "_cuda"}.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    is_timed = args.device == 'cpu' and args.only != 'memory'
    timed = (args.names or TIMED) if is_timed else ()
    measured = (args.names or MEASURED) if args.only in (None, 'memory') else ()
    tasks = [args.only] if args.only in BATCH else list(BATCH)
    size = sorted(args.size, reverse=True)
    with Progress(refresh_per_second=1) as progress:  # whose thread's time would count for a part's
        for report in measure(timed, measured, size, args.crop, args.rounds, args.device, progress, tasks):
            path.write_text(json.dumps(merged(report, path), indent=2) + '\n')
    console = Console()
    for table in tables(report):
        console.print(table)
    for name, found in report['memory'].items():
        if found['peak'] is None:
            console.print(f'{name}: {found["reason"]}')
    console.print('written to', str(path))


if __name__ == '__main__':
    main()
