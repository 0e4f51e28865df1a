"""The training loop beside a bare PyTorch loop: what the engine, its hooks, seeds and records cost an iteration.

    python -m benchmarks.training                               # steps of about 100 ms
    python -m benchmarks.training --step 20 --iterations 200
    python -m benchmarks.training --model van_b0 --size 224 --device cuda

Both loops train one model by one optimizer on the same small PNG files, which the loop's own process loads; the bare
loop is a page of PyTorch without seeds, records, checkpoints, signals or a progress line. They take turns, an
iteration each, in one process: an iteration of the zoo's `train`, with the hooks of configs/_base_/runtime.py, then one
of the bare loop. On the CPU process time with one thread of torch, so other work on the machine counts for little; on a
GPU wall time, synchronized after each iteration, which hides nothing of the loop's cost behind the GPU's work. The
batch is chosen so that the bare iteration takes about --step milliseconds. In `seeding the samples` each image gets
random numbers of its own; with workers that is their cost, not the loop's.

A second run has the time that each hook takes an iteration. Writes results/training.json beside this file, or the file
that --json names.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from mmengine.hooks import Hook
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from zoo.benchmarks.timing import machine
from zoo.train.registry import HOOKS
from zoo.train.run import train
from zoo.train.seeding import seed_everything

RESULTS = Path(__file__).parent / 'results'
CONFIG = 'quickstart/biformer_digits'
CLASSES = 10
WARMUP = 10  # iterations


class BareLoop:
    """What anyone would write: an iteration is a call.

    On a runner's own model and optimizer: copies would lie elsewhere in memory, which shows in the third digit.
    """

    def __init__(self, runner):
        self.model = runner.model
        self.device = next(self.model.parameters()).device
        self.max_norm = runner.cfg.optim_wrapper.clip_grad.max_norm
        self.optimizer = runner.optim_wrapper.optimizer
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        loader = runner.train_dataloader
        self.batches = iter(DataLoader(loader.dataset, loader.batch_size, shuffle=True, drop_last=True))

    def __call__(self) -> None:
        images, labels = next(self.batches)
        images, labels = images.to(self.device), labels.to(self.device)
        loss = self.model(images, labels, mode='loss')['loss']
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()


def _clock(device: str):
    if device != 'cuda':
        return time.process_time

    def synchronized():
        torch.cuda.synchronize()
        return time.perf_counter()

    return synchronized


@HOOKS.register_module()
class Beside(Hook):
    """After each iteration of the loop one of a bare loop. Their seconds go to beside.json in the run's folder."""

    priority = 'LOWEST'

    def __init__(self, device: str):
        self.clock = _clock(device)

    def before_train(self, runner) -> None:
        self.bare = BareLoop(runner)
        self.seconds = {'loop': [], 'bare': []}
        self.start = self.clock()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        end = self.clock()
        self.seconds['loop'].append(end - self.start)
        if batch_idx + 1 < runner.max_iters:
            self.bare()
            self.start = self.clock()
            self.seconds['bare'].append(self.start - end)

    def after_train(self, runner) -> None:
        Path(runner.work_dir, 'beside.json').write_text(json.dumps(self.seconds))


@HOOKS.register_module()
class Parts(Hook):
    """The seconds of each other hook in each iteration go to parts.json in the run's folder."""

    METHODS = ('before_train_iter', 'after_train_iter')

    def __init__(self, device: str):
        self.clock = _clock(device)

    def before_train(self, runner) -> None:
        self.seconds = {}
        for hook in runner.hooks:
            if hook is not self:
                samples = self.seconds[type(hook).__name__] = []
                for method in self.METHODS:
                    setattr(hook, method, self._timed(getattr(hook, method), samples))

    def after_train(self, runner) -> None:
        Path(runner.work_dir, 'parts.json').write_text(json.dumps(self.seconds))

    def _timed(self, method, samples):
        def call(runner, **arguments):
            start = self.clock()
            method(runner, **arguments)
            samples.append(self.clock() - start)

        return call


def _write_images(folder: Path, count: int, size: int) -> None:
    pixels = np.random.default_rng(0)
    for split, number in (('train', count), ('test', CLASSES)):
        for i in range(number):
            path = folder / split / str(i % CLASSES) / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            # of 8 x 8 colours, as noise would take longest to decode
            Image.fromarray(pixels.integers(256, size=(8, 8, 3), dtype=np.uint8)).resize((size, size), 0).save(path)


def _run(folder: Path, model: dict, size: int, batch: int, iterations: int, hook: dict) -> None:
    images = folder / 'images'
    if not images.exists():
        _write_images(images, batch * iterations, size)

    def dataset(split):
        steps = [{'type': 'PILToTensor'}]
        return {'type': 'LabelledImages', 'root': str(images), 'split': split, 'transform': steps, '_delete_': True}

    options = {
        'model.backbone': {**model, 'num_classes': CLASSES, '_delete_': True},
        'train_cfg.max_epochs': 1,
        'train_dataloader.dataset': dataset('train'),
        'train_dataloader.batch_size': batch,
        'val_dataloader.dataset': dataset('test'),
        'default_hooks.checkpoint.interval': 1,
        'custom_hooks': [hook],
    }
    train(CONFIG, folder / hook['type'], cfg_options=options, preflight=False)


def measure(model: dict, size: int, step: float, iterations: int, device: str = 'cpu') -> dict:
    """Seconds an iteration of both loops, and of each hook.

    Args:
        model: name and arguments of timm.create_model.
        size: height and width of the images.
        step: seconds that the bare iteration is to take.
        iterations: to measure, after WARMUP others.
        device: 'cpu' or 'cuda'.

    Returns:
        {'machine', 'setting', 'loop', 'bare', 'overhead': {'median', 'quartiles', 'share'}, 'hooks', 'samples'}:
        'overhead' is of the pairs of neighbouring iterations.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    hook = {'type': 'Beside', 'device': device}
    try:
        with tempfile.TemporaryDirectory() as folder:
            # Two batches, as an iteration has a part that doesn't grow with its images.
            trials = {}
            for batch in (2, 8):
                _run(Path(folder, f'trial{batch}'), model, size, batch, WARMUP, hook)
                trial = json.loads(Path(folder, f'trial{batch}', 'Beside', 'beside.json').read_text())
                trials[batch] = statistics.median(trial['bare'][2:])
            slope = max((trials[8] - trials[2]) / 6, 1e-6)
            batch = max(1, round(2 + (step - trials[2]) / slope))
            for each in (hook, {**hook, 'type': 'Parts'}):
                _run(Path(folder, 'run'), model, size, batch, iterations + WARMUP + 1, each)
            seconds = json.loads(Path(folder, 'run', 'Beside', 'beside.json').read_text())
            parts = json.loads(Path(folder, 'run', 'Parts', 'parts.json').read_text())
        start = time.process_time()
        for draw in range(1000):
            seed_everything(0, draw)
        sample = (time.process_time() - start) / 1000
    finally:
        torch.set_num_threads(threads)
    # The last iteration writes a checkpoint, and has no bare one after it.
    loop, bare = seconds['loop'][WARMUP:-1], seconds['bare'][WARMUP:]
    differences = [a - b for a, b in zip(loop, bare, strict=True)]
    lower, median, upper = statistics.quantiles(differences, n=4)
    calls = len(Parts.METHODS)
    return {
        'machine': machine(),
        'setting': {
            'model': model,
            'size': size,
            'batch': batch,
            'iterations': iterations,
            'device': device,
            'threads': 1,
        },
        'loop': statistics.median(loop),
        'bare': statistics.median(bare),
        'overhead': {
            'median': median,
            'quartiles': [lower, upper],
            'share': median / statistics.median(bare),
        },
        'hooks': {name: calls * statistics.mean(samples[calls * WARMUP : -calls]) for name, samples in parts.items()},
        'samples': batch * sample,
    }


def rows(report: dict) -> list[list[str]]:
    """What a table shows: what, milliseconds an iteration, share of the bare loop's."""
    bare, overhead = report['bare'], report['overhead']
    lower, upper = (1e3 * each for each in overhead['quartiles'])
    lines = [
        ('bare loop', f'{1e3 * bare:.2f}', ''),
        ("the zoo's loop", f'{1e3 * report["loop"]:.2f}', ''),
        ('overhead', f'{1e3 * overhead["median"]:.2f} ({lower:.2f} to {upper:.2f})', f'{overhead["share"]:.2%}'),
        ('seeding the samples', f'{1e3 * report["samples"]:.3f}', f'{report["samples"] / bare:.2%}'),
    ]
    for name, seconds in sorted(report['hooks'].items(), key=lambda item: -item[1]):
        lines.append((f'hook {name}', f'{1e3 * seconds:.3f}', f'{seconds / bare:.2%}'))
    return [list(line) for line in lines]


def table(report: dict) -> Table:
    setting = report['setting']
    place = 'CPU, one thread' if setting['device'] == 'cpu' else report['machine']['accelerator']
    title = f'{setting["model"]["name"]} at {setting["size"]}x{setting["size"]}, batch {setting["batch"]}: {place}'
    result = Table('', 'ms an iteration', 'of the bare loop', title=title)
    for line in rows(report):
        result.add_row(*line)
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='vit_tiny_patch16_224', help='a name that timm knows')
    parser.add_argument('--size', type=int, default=64, help='height and width of the images')
    parser.add_argument('--step', type=float, default=100, help='milliseconds that the bare iteration is to take')
    parser.add_argument('--iterations', type=int, default=100)
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument('--json', type=Path, help='file to write the report to')
    args = parser.parse_args(arguments)
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('there is no CUDA GPU here')
    if args.step <= 0 or args.iterations < 4:
        parser.error('--step must be positive, --iterations at least 4')
    import timm

    if not timm.is_model(args.model):
        parser.error(f'timm knows no model called {args.model}')
    fixed = timm.get_pretrained_cfg(args.model).fixed_input_size
    model = {'name': args.model, **({'img_size': args.size} if fixed else {})}
    report = measure(model, args.size, args.step / 1e3, args.iterations, args.device)
    path = args.json or RESULTS / f'training{"" if args.device == "cpu" else "_cuda"}.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + '\n')
    console = Console()
    console.print(table(report))
    console.print('written to', str(path))


if __name__ == '__main__':
    main()
