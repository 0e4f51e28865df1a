"""The recorded results as the tables of docs/benchmarks.md.

    python -m benchmarks.report            # prints them
    python -m benchmarks.report --write    # writes docs/benchmarks.md

Reads every file of results/; measures nothing.
"""

import argparse
import json
from pathlib import Path

from zoo.benchmarks import dense, loader, models, training
from zoo.benchmarks.kernels import BENCHMARKS, RESULTS
from zoo.benchmarks.models import ACCELERATED, COMPILED, OFFICIAL
from zoo.benchmarks.operators import rows

PAGE = Path(__file__).parents[1] / 'docs' / 'benchmarks.md'
HEAD = """# Measurements

Written by `zoo bench report --write` from the files in `benchmarks/results/`; each section has the command that
measures it again. On the CPU times are thread CPU time of one thread, interleaved, so that other work on the machine
counts for little.
"""


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A table; cells after the first are aligned to the right."""
    rule = ['---'] + ['---:'] * (len(header) - 1)
    return '\n'.join('| ' + ' | '.join(cells) + ' |' for cells in (header, rule, *lines))


def on_machine(machine: dict) -> str:
    place = machine['accelerator'] or f'{machine["processor"]} ({machine["capability"]})'
    versions = ', '.join(f'{name} {version}' for name, version in machine['versions'].items() if version)
    return f'{place}, Python {machine["python"]}, {versions}, {machine["date"][:10]}'


def operator_section(name: str, device: str, report: dict) -> str:
    header = ['case', 'function', 'forward, ms', 'times faster', 'with backward, ms', 'times faster', 'MiB']
    bounds = report.get('bounds')
    if bounds:
        header += ['of the copy rate', 'of the product rate']
    lines = []
    for case, entry in report['cases'].items():
        for function, cells in rows(entry):
            line = [case, function, *cells]
            seconds = entry['functions'][function]['forward']
            if bounds and entry.get('cost') and seconds:
                line += [f'{entry["cost"]["bytes"] / seconds / bounds["copy"]:.0%}']
                line += [f'{entry["cost"]["operations"] / seconds / bounds["product"]:.0%}']
            lines.append(line + [''] * (len(header) - len(line)))
    option = '' if device == 'cpu' else f' --device {device}'
    title = f'## {name.capitalize()} attention on {"the CPU" if device == "cpu" else "a GPU"}'
    command = f'`python -m benchmarks.kernels {name}{option}`: {on_machine(report["machine"])}.'
    command += ' Times faster than the first line of a case that runs.'
    return '\n\n'.join((title, command, markdown(header, lines)))


def in_groups(setting: dict) -> str:
    return f' --together {setting["together"]}' if 'together' in setting else ''


def models_section(report: dict) -> str:
    setting = report['setting']
    size, batch = setting['size'], setting['batch']
    device = '' if setting['device'] == 'cpu' else f' --device {setting["device"]}'
    together = in_groups(setting)
    compiled = ' --compile' if any(name.endswith(COMPILED) for name in report['models']) else ''
    lines = [
        [
            row['model'],
            f'{row["M parameters"]:.1f}',
            f'{row["GMACs"]:.2f}',
            f'{row["forward images/s"]:,.3g}',
            f'{row["forward TMAC/s"]:.3g}',
            *(f'{row[f"{measure} relative"]:.2f}' for measure in ('forward', 'training step', 'memory')),
        ]
        for row in models.rows(report)
    ]
    names = dict.fromkeys(name.removesuffix(COMPILED) for name in report['models'])
    names = ' '.join(name for name in names if name not in (setting['baseline'], *models.ALWAYS))
    title = f'## Models on {"the CPU" if not device else "a GPU"}{", compiled too" if compiled else ""}'
    title += ', accelerated too' if any(ACCELERATED in name for name in report['models']) else ''
    title += f': {size}x{size}, batch {batch}'
    command = f'`python -m benchmarks.models {names} --size {size} --batch {batch}{device}{compiled}{together}`: '
    command += f'{on_machine(report["machine"])}. Time and memory are multiples of those of {setting["baseline"]},'
    command += ' compiled if the model is; `:official` is the same model with its attention in the formulation of its'
    command += " authors' code, `:accelerated` one that has gone through `zoo.accelerate`."
    header = ['model', 'parameters, M', 'GMACs', 'forward, images/s', 'TMAC/s', 'forward', 'training step', 'memory']
    return '\n\n'.join((title, command, markdown(header, lines)))


def formulations_section(report: dict, path: Path) -> str:
    """Each family beside itself in the formulation of its authors' code; the figures of both are in the report."""
    setting, found = report['setting'], report['models']
    pairs = {name: (found[name], found[name + OFFICIAL]) for name in found if name + OFFICIAL in found}
    lines = [
        [
            name,
            f'{ours["macs"] / 1e9:.2f}',
            f'{setting["batch"] / ours["forward"]:,.3g}',
            *(f'{official[measure] / ours[measure]:.2f}' for measure in ('forward', 'train', 'memory')),
            *(f'{ours["relative"][measure]:.2f}' for measure in ('forward', 'train', 'memory')),
        ]
        for name, (ours, official) in pairs.items()
    ]
    names = ' '.join(f'{name} {name}{OFFICIAL}' for name in pairs)
    size, batch = setting['size'], setting['batch']
    title = f"## Families beside their authors' formulations on the CPU: {size}x{size}, batch {batch}"
    command = f'`python -m benchmarks.models {names} --size {size} --batch {batch}{in_groups(setting)}'
    command += f' --json {path.relative_to(PAGE.parents[1])}`: {on_machine(report["machine"])}. How many times the time'
    command += " and memory of a model are those of the same with its token mixers in the formulation of its authors'"
    command += f' code; then its time and memory as multiples of those of {setting["baseline"]}.'
    measures = ['forward', 'training step', 'memory']
    header = ['model', 'GMACs', 'forward, images/s']
    header += [f'official: {measure}' for measure in measures]
    header += [f'{setting["baseline"]}: {measure}' for measure in measures]
    return '\n\n'.join((title, command, markdown(header, lines)))


def training_section(report: dict) -> str:
    setting = report['setting']
    device = '' if setting['device'] == 'cpu' else f' --device {setting["device"]}'
    command = f'`python -m benchmarks.training --model {setting["model"]["name"]} --size {setting["size"]}'
    command += f' --iterations {setting["iterations"]}{device}`: {on_machine(report["machine"])}. Batches of'
    command += f' {setting["batch"]} images; {"process time with one thread" if not device else "wall time"}. Medians,'
    command += ' and of the overhead, that of pairs of neighbouring iterations, the quartiles too.'
    title = f'## The training loop on {"the CPU" if not device else "a GPU"}, beside a bare PyTorch loop'
    return '\n\n'.join((title, command, markdown(['', 'ms an iteration', 'of the bare loop'], training.rows(report))))


def loader_section(reports: dict) -> str:
    parts = ['## What bounds a run: loader, model, and both']
    for name, report in reports.items():
        setting = report['setting']
        workers = ' '.join(report['workers'])
        what = f'--model {setting["model"]} --size {setting["image"][-1]}' if ' on ' in name else name
        command = f'`python -m benchmarks.loader {what} --batch {setting["batch"]} --workers {workers}`: '
        command += f'{on_machine(report["machine"])}. {setting["model"]} alone {report["model"]:,.1f} images/s, with'
        command += f' {setting["threads"]} threads; wall time. {loader.verdict(report)}'
        parts += [command, markdown(list(loader.COLUMNS), loader.rows(report))]
    return '\n\n'.join(parts)


def dense_section(report: dict) -> str:
    setting = report['setting']
    size = 'x'.join(map(str, setting['size']))
    options = f'--size {size.replace("x", " ")} --crop {setting["crop"]} --rounds {setting["rounds"]}'
    options += '' if setting['device'] == 'cpu' else f' --device {setting["device"]}'
    parts = [f'## Dense prediction{"" if setting["device"] == "cpu" else " on a GPU"}']
    parts += [f'{on_machine(report["machine"])}. Weights are untrained, images and annotations generated.']
    if report['steps']:
        names = ' '.join(dict.fromkeys(name for models in report['steps'].values() for name in models))
        command = (
            f'Steps, `python -m benchmarks.dense {names} {options}`: process time with one thread, medians. What is'
        )
        command += ' not backbone, neck, heads, losses, backward pass or optimizer is data and post-processing:'
        command += f' Mask R-CNN with a batch of {dense.BATCH["mask_rcnn"]} at {size}, UPerNet with'
        command += f' {dense.BATCH["upernet"]} crops of {setting["crop"]}, both testing one image. As the weights are'
        command += ' untrained, each class of each proposal goes through NMS: far more than a trained model finds.'
        parts += [command, markdown(list(dense.STEP_COLUMNS), dense.step_rows(report))]
    if report['memory']:
        command = f'Memory, `python -m benchmarks.dense {" ".join(report["memory"])} {options} --only memory`: how far'
        command += f' it rises in a Mask R-CNN step of one image of {size} in float32, without the optimizer, above the'
        command += ' weights and images; x is the multiple of resnet50. `held` is what weights and AdamW take.'
        parts += [command, markdown(list(dense.MEMORY_COLUMNS), dense.memory_rows(report))]
    return '\n\n'.join(parts)


def page() -> str:
    """docs/benchmarks.md, from what is recorded."""
    sections = [HEAD.strip()]
    newest = sorted(RESULTS.glob('cuda_*.json'))[-1:]  # by their dates
    for device, paths in (('cpu', [RESULTS / f'{name}.json' for name in BENCHMARKS]), ('cuda', newest)):
        for path in filter(Path.exists, paths):
            for name, report in json.loads(path.read_text()).items():
                sections.append(operator_section(name, device, report))
    families = sorted(RESULTS.glob('models_families_*.json'))
    others = sorted(set(RESULTS.glob('models_*.json')) - set(families))
    sections += [formulations_section(json.loads(path.read_text()), path) for path in families]
    sections += [models_section(json.loads(path.read_text())) for path in others]
    sections += [training_section(json.loads(path.read_text())) for path in sorted(RESULTS.glob('training*.json'))]
    sections += [loader_section(json.loads(path.read_text())) for path in sorted(RESULTS.glob('loader*.json'))]
    sections += [dense_section(json.loads(path.read_text())) for path in sorted(RESULTS.glob('dense*.json'))]
    return '\n\n'.join(sections) + '\n'


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--write', action='store_true', help='write docs/benchmarks.md')
    args = parser.parse_args(arguments)
    text = page()
    if args.write:
        PAGE.write_text(text)
        print(f'written to {PAGE}')
    else:
        print(text, end='')


if __name__ == '__main__':
    main()
