"""The report of a run: what it reached, how fast, on what, and how to have it again. Also of a killed run:

python -m zoo.train.report WORK_DIR
"""

import argparse
import csv
import io
import itertools
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from mmengine.config import Config

from . import checkpoints, pictures
from .checkpoints import write_atomically
from .config import READ
from .records import duration, read_curve

__all__ = ['main', 'write_report']

OF_THE_START = ('work_dir', 'resume', 'launcher', 'experiment_name')  # set by each start; the rest is the recipe
MAIN_PACKAGES = ('attention-zoo', 'torch', 'torchvision', 'timm', 'mmengine', 'numpy', 'pillow', 'triton')


def write_report(work_dir: Path | str) -> Path:
    """Write work_dir/report from the records of a run that ended, was killed or still goes on. Returns its index.md.

    index.md has all in text: the measures, the speed, every start of the run, what preflight found (preflight.json, if
    the run has one), the command that repeats it, the environment and the config. Beside it are curve.png, speed.png,
    the tables losses.csv, validations.csv, starts.csv and summary.csv, config.py, environment.json and
    requirements.txt. Facts that need Speed's records are left out of a run without them.

    Raises:
        FileNotFoundError: the folder has no curve.jsonl.
    """
    work_dir = Path(work_dir)
    if not (work_dir / 'curve.jsonl').exists():
        raise FileNotFoundError(f'{work_dir.absolute()} has no curve.jsonl: give the work_dir of a run.')
    run = _Run(work_dir)
    folder = work_dir / 'report'
    folder.mkdir(exist_ok=True)
    write_atomically(folder / 'curve.png', lambda path: _picture(pictures.training_curve, run.curve, path))
    if run.starts:
        write_atomically(folder / 'speed.png', lambda path: _picture(pictures.speed_curve, run.speed, path))
        environment = run.starts[-1]['environment']
        _write(folder / 'environment.json', json.dumps(environment, indent=2) + '\n')
        packages = environment['packages'].items()
        _write(folder / 'requirements.txt', ''.join(f'{name}=={version}\n' for name, version in packages))
    if run.config:
        _write(folder / 'config.py', run.config)
    for name, rows in run.tables().items():
        _write(folder / f'{name}.csv', _csv(rows))
    _write(folder / 'index.md', _index(run, folder))
    return folder / 'index.md'


class _Run:
    """What the files of a work_dir say."""

    def __init__(self, work_dir: Path):
        self.work_dir = work_dir
        self.curve = read_curve(work_dir / 'curve.jsonl')
        self.losses = [record for record in self.curve if 'loss' in record]
        self.validations = [record for record in self.curve if 'loss' not in record]
        path = work_dir / 'speed.jsonl'
        self.speed = read_curve(path) if path.exists() else []
        self.starts = [record for record in self.speed if record['event'] == 'start']
        self.speed = self.speed[self.speed.index(self.starts[0]) :] if self.starts else []
        preflight = work_dir / 'preflight.json'
        self.preflight = json.loads(preflight.read_text()) if preflight.exists() else None
        self.config = self._config()
        self.done = max((record['iter'] for record in self.curve), default=0)

    def _config(self) -> str | None:
        """The config of the last start, without what only belongs to that start, and with the seed that was drawn."""
        path = self.work_dir / self.starts[-1]['config'] if self.starts else None
        if path is None or not path.exists():
            return None
        config = Config.fromfile(path)
        for key in list(config):
            if key in OF_THE_START or key not in READ:  # what is left of the config file's variables
                config.pop(key)
        config.randomness = {**config.get('randomness', {}), 'seed': self.starts[-1]['seed']}
        return config.pretty_text

    @property
    def title(self) -> str:
        return self.starts[-1]['config'].removesuffix('.py') if self.starts else self.work_dir.absolute().name

    @property
    def has_ended(self) -> bool:
        return bool(self.speed) and self.speed[-1]['event'] == 'end'

    def events(self, kind: str) -> list[dict]:
        return [record for record in self.speed if record['event'] == kind]

    def seconds(self, kind: str) -> float:
        return sum(record['seconds'] for record in self.events(kind))

    def segments(self) -> list[list[dict]]:
        """The records of each start."""
        at = [i for i, record in enumerate(self.speed) if record['event'] == 'start'] + [len(self.speed)]
        return [self.speed[a:b] for a, b in itertools.pairwise(at)]

    def tables(self) -> dict[str, list[dict]]:
        return {
            'losses': self.losses,
            'validations': self.validations,
            'summary': [{'what': what, 'value': value} for what, value in self.summary().items()],
            **({'starts': self.start_rows()} if self.starts else {}),
        }

    def measures(self) -> list[dict]:
        """Best and last of each measure of the validations; of a loss the least is the best."""
        rows = []
        for name in dict.fromkeys(key for record in self.validations for key in record if key not in ('iter', 'epoch')):
            records = [record for record in self.validations if name in record]
            # A NaN is neither better nor worse, and would make any order.
            numbers = [record for record in records if record[name] == record[name]] or records
            best = (min if 'loss' in name else max)(numbers, key=lambda record: record[name])
            row = {'measure': name, 'best': best[name], 'best at epoch': best['epoch']}
            rows.append(row | {'last': records[-1][name], 'last at epoch': records[-1]['epoch']})
        return rows

    def summary(self) -> dict[str, object]:
        """Plain figures of the run, by what they are."""
        found: dict[str, object] = {'iterations': self.done}
        if self.losses:
            found |= {'last training loss': self.losses[-1]['loss']}
        for row in self.measures():
            found |= {f'best {row["measure"]}': row['best'], f'last {row["measure"]}': row['last']}
        if not self.starts:
            return found
        start, train = self.starts[-1], self.events('train')
        found |= {
            'of iterations': start['max_iters'],
            'parameters': start['parameters'],
            'trainable parameters': start['trainable'],
            'images an iteration': start['batch'],
            'starts': len(self.starts),
            'seconds, all starts': round(sum(s[-1]['time'] - s[0]['time'] for s in self.segments()), 3),
            'seconds in training': round(self.seconds('train'), 3),
            'of them waiting for data': round(sum(record['data_seconds'] for record in train), 3),
            'seconds in validation': round(self.seconds('validation'), 3),
            'seconds in checkpoints': round(self.seconds('checkpoint'), 3),
            'iterations done again after a stop': self._repeated(),
        }
        if train:
            found['images a second'] = round(statistics.median(record['images_per_second'] for record in train), 1)
        peaks = [record['peak_memory'] for record in train if record['peak_memory'] is not None]
        if peaks:
            found['peak memory, bytes'] = max(peaks)
        return found

    def _repeated(self) -> int:
        reached = [max(record['iter'] for record in segment) for segment in self.segments()]
        return sum(max(0, end - start['iter']) for end, start in zip(reached, self.starts[1:], strict=False))

    def start_rows(self) -> list[dict]:
        rows = []
        for segment in self.segments():
            start = segment[0]
            accelerators = start['environment']['accelerators']
            rows.append(
                {
                    'started': _moment(start['time']),
                    'from iteration': start['iter'],
                    'to': max(record['iter'] for record in segment),
                    'took': duration(segment[-1]['time'] - start['time']),
                    'processes': start['processes'],
                    'machines': start['nodes'],
                    'first machine': start['environment']['host'],
                    'its accelerators': _counted(accelerators) or f'CPU: {start["environment"]["processor"]}',
                    'end': 'trained to the end' if segment[-1]['event'] == 'end' else 'stopped, or still running',
                }
            )
        return rows


def _index(run: _Run, folder: Path) -> str:
    parts = [f'# {run.title}', _status(run)]
    if run.validations:
        parts += ['## Reached', _markdown(run.measures())]
    parts += ['![losses and measures](curve.png)']
    if run.starts:
        parts += ['## Time', _markdown(_time_rows(run)), '![images a second](speed.png)']
        parts += ['## Starts', _markdown(run.start_rows())]
    if run.preflight is not None:
        parts += ['## Preflight', _preflight(run.preflight)]
    files = [path for path in _files(run) if path.exists()]
    parts += ['## Files', '\n'.join(f'- [{path.name}](../{path.name})' for path in files)]
    if run.config:
        parts += ['## Again', _again(run, folder)]
    if run.starts:
        parts += ['## Environment', _markdown(_environment_rows(run.starts[-1]['environment']))]
    if run.config:
        parts += ['## Config', f'```python\n{run.config.strip()}\n```']
    return '\n\n'.join(parts) + '\n'


def _files(run: _Run) -> list[Path]:
    names = ('model.safetensors', 'best.pth', 'curve.jsonl', 'speed.jsonl')
    return [run.work_dir / name for name in names] + checkpoints.numbered(run.work_dir)


def _status(run: _Run) -> str:
    if not run.starts:
        return f'{run.done} iterations are recorded; the run has no speed.jsonl, so no times.'
    start, summary = run.starts[-1], run.summary()
    epochs = run.done / start['epoch_length']
    of = f'{epochs:.4g} of {start["max_iters"] / start["epoch_length"]:.4g} epochs'
    text = f'Trained to the end: {of}' if run.has_ended else f'**Not at its end**: {of}'
    text += f' ({run.done:,} iterations of {start["batch"]:,} images) in {duration(summary["seconds, all starts"])}'
    text += f', {start["parameters"] / 1e6:.2f} million parameters'
    if summary['starts'] > 1:
        twice = summary['iterations done again after a stop']
        text += f'; {summary["starts"]} starts, at least {twice:,} iterations done twice'
    return text + '.'


def _time_rows(run: _Run) -> list[dict]:
    summary = run.summary()
    total = summary['seconds, all starts']
    parts = {
        'training': summary['seconds in training'] - summary['of them waiting for data'],
        'waiting for data': summary['of them waiting for data'],
        'validation': summary['seconds in validation'],
        'checkpoints': summary['seconds in checkpoints'],
    }
    parts['other, or not recorded before a kill'] = max(0.0, total - sum(parts.values()))
    rows = [
        {'': name, 'value': duration(seconds), 'share': f'{seconds / total:.1%}' if total else ''}
        for name, seconds in parts.items()
    ]
    facts = {'all': duration(total)}
    accelerated = sum(
        (segment[-1]['time'] - segment[0]['time']) * segment[0]['processes']
        for segment in run.segments()
        if segment[0]['environment']['accelerators']
    )
    if accelerated:
        facts['GPU hours'] = f'{accelerated / 3600:.2f}'
    if 'images a second' in summary:
        facts['images a second, median'] = f'{summary["images a second"]:,}'
    if 'peak memory, bytes' in summary:
        where = 'first GPU' if accelerated else 'first process'
        facts[f'peak memory of the {where}'] = f'{summary["peak memory, bytes"] / 2**30:.2f} GiB'
    return rows + [{'': name, 'value': value, 'share': ''} for name, value in facts.items()]


def _preflight(found: dict) -> str:
    """`preflight.Report.to_json()` as a table."""
    rows = [
        {
            'check': each['name'],
            '': each['level'] if each['level'] == 'ok' else f'**{each["level"]}**',
            'expected': each['expected'],
            'found': f'{each["found"]}. {each["cause"]}' if each['cause'] else each['found'],
        }
        for each in found['findings']
    ]
    parts = [f'{len(rows)} checks ({found["depth"]}) in {duration(found["seconds"])}.', _markdown(rows) if rows else '']
    left_out = '; '.join(f'{name} ({reason})' for name, reason in found['not_checked'].items())
    parts.append(f'Not checked: {left_out}.' if left_out else '')
    return '\n\n'.join(filter(None, parts))


def _again(run: _Run, folder: Path) -> str:
    start = run.starts[-1]
    config = shlex.quote(str(folder / 'config.py'))
    launcher = 'zoo'
    if start['processes'] > 1:
        machines = f'--nnodes={start["nodes"]} ' if start['nodes'] > 1 else '--standalone '
        launcher = f'torchrun {machines}--nproc-per-node={start["processes"] // start["nodes"]} -m zoo'
    commands = {
        'The same run': f'{launcher} train {config} --work-dir NEW_FOLDER',
        'This one was started by': start['command'],
    }
    text = '\n\n'.join(f'{what}:\n\n```\n{command}\n```' for what, command in commands.items())
    if any(
        each['environment'] != start['environment'] or each['processes'] != start['processes'] for each in run.starts
    ):
        text += '\n\nThe starts differ in environment or processes; these are those of the last one.'
    return text


def _environment_rows(environment: dict) -> list[dict]:
    packages = environment['packages']
    values = {
        'machine': environment['host'],
        'system': environment['system'],
        'processor': f'{environment["processor"]}, {environment["cores"]} cores',
        "torch's threads": environment['threads'],
        'accelerators': _counted(environment['accelerators']) or 'none',
        'CUDA, cuDNN': f'{environment["cuda"]}, {environment["cudnn"]}' if environment['cuda'] else None,
        'Python': environment['python'],
        **{name: packages.get(name) for name in MAIN_PACKAGES},
        **{f'commit of the {where}': commit for where, commit in environment['commits'].items()},
        'precision of float32 products': environment['float32_matmul_precision'],
        **environment['variables'],
    }
    rows = [{'': name, 'value': str(value)} for name, value in values.items() if value is not None]
    return [*rows, {'': 'all packages', 'value': '[requirements.txt](requirements.txt)'}]


def _counted(names: Sequence[str]) -> str:
    return ', '.join(f'{names.count(name)} x {name}' for name in dict.fromkeys(names))


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime('%Y-%m-%d %H:%M:%S UTC')


def _markdown(rows: Sequence[dict]) -> str:
    def cell(value) -> str:
        return f'{value:.5g}' if isinstance(value, float) else str(value).replace('|', '\\|').replace('\n', ' ')

    lines = [list(rows[0]), ['---'] * len(rows[0]), *(map(cell, row.values()) for row in rows)]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def _csv(rows: Sequence[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding='utf-8'))


def _picture(draw, records: Sequence[dict], temporary: Path) -> None:
    with temporary.open('wb') as file:  # matplotlib takes the format from a file's name
        draw(records, file)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog='python -m zoo.train.report', description=write_report.__doc__.split('\n')[0])
    parser.add_argument('work_dir', type=Path, help='folder of the run')
    args = parser.parse_args(arguments)
    try:
        print(write_report(args.work_dir))
    except FileNotFoundError as error:
        parser.error(str(error))
    return 0


if __name__ == '__main__':
    sys.exit(main())
