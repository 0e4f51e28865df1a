"""Pictures of a run and of what a model looks at. Each function writes one PNG."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

__all__ = ['prediction_grid', 'routed_regions', 'speed_curve', 'training_curve']

RIGHT, WRONG, QUERY, ROUTED = '#2a7f3f', '#c62828', '#1565c0', '#ef6c00'
POINTS = 500  # of a curve: more cannot be told apart


def training_curve(records: Sequence[dict], path: Path | str) -> None:
    """Loss and learning rate over epochs, and the measures of the validations; records as `records.read_curve` gives.

    Of a long run each point of the losses is a mean, in a band from the least to the greatest. Measures in per cent
    share a panel and others another; those of a loss (by their names) are beside the training's. The best value of each
    is marked, and given with the last in the legend.
    """
    steps = [record for record in records if 'loss' in record]
    validations = [record for record in records if 'loss' not in record]
    measures = list(dict.fromkeys(key for record in validations for key in record if key not in ('iter', 'epoch')))
    points = {name: [(r['epoch'], r[name]) for r in validations if name in r] for name in measures}
    losses = [name for name in measures if 'loss' in name]
    per_cent = [name for name in measures if name not in losses and _is_per_cent([y for _, y in points[name]])]
    others = [name for name in measures if name not in (*losses, *per_cent)]
    panels = {'in validation (%)': per_cent, 'in validation': others}
    panels = {title: names for title, names in panels.items() if names} or {'in validation (%)': []}

    figure = Figure(figsize=(5.5 * (1 + len(panels)), 4), layout='constrained')
    left, *right = figure.subplots(1, 1 + len(panels))
    epochs, (least, means, greatest) = _thinned([r['epoch'] for r in steps], [r['loss'] for r in steps])
    left.plot(epochs, means, color=QUERY, label='training')
    if len(steps) > POINTS:
        left.fill_between(epochs, least, greatest, color=QUERY, alpha=0.2, linewidth=0)
    for i, name in enumerate(losses):
        _draw_measure(left, name, points[name], min, color=f'C{i + 2}')
    if losses:
        left.legend()
    left.set(xlabel='epoch', ylabel='loss' if losses else 'training loss')
    rate = left.twinx()
    epochs, (_, means, _) = _thinned([r['epoch'] for r in steps], [r['lr'] for r in steps])
    rate.plot(epochs, means, color=ROUTED, linestyle=':')
    rate.set_ylabel('learning rate', color=ROUTED)
    for axes, (title, names) in zip(right, panels.items(), strict=True):
        for name in names:
            _draw_measure(axes, name, points[name], max)
        if names:
            axes.legend()
        axes.set(xlabel='epoch', ylabel=title)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def speed_curve(records: Sequence[dict], path: Path | str) -> None:
    """Images a second, and the part of the time that the loop waited for data, over hours since the first start.

    Records are those of speed.jsonl; a line stands at each start.
    """
    starts = [record['time'] for record in records if record['event'] == 'start']
    figure = Figure(figsize=(11, 3.5), layout='constrained')
    axes = figure.subplots()
    waiting = axes.twinx()
    for start, end in zip(starts, [*starts[1:], np.inf], strict=True):
        lines = [r for r in records if r['event'] == 'train' and start <= r['time'] < end]
        hours = [(r['time'] - starts[0]) / 3600 for r in lines]
        x, (_, speed, _) = _thinned(hours, [r['images_per_second'] for r in lines])
        axes.plot(x, speed, color=QUERY, marker='.' if len(x) < 2 else None)
        x, (_, share, _) = _thinned(hours, [100 * r['data_seconds'] / r['seconds'] for r in lines])
        waiting.plot(x, share, color=ROUTED, linestyle=':', marker='.' if len(x) < 2 else None)
        axes.axvline((start - starts[0]) / 3600, color='gray', linewidth=0.5)
    axes.set(xlabel='hours since the first start', ylim=(0, None))
    axes.set_ylabel('images a second', color=QUERY)
    waiting.set_ylim(0, 100)
    waiting.set_ylabel('waiting for data (%)', color=ROUTED)
    figure.savefig(path, dpi=120)


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """At most POINTS means of consecutive x, and least, mean and greatest of their y."""
    parts = np.array_split(np.arange(len(x)), min(POINTS, max(1, len(x)))) if len(x) else []
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    of_y = tuple(np.array([function(y[part]) for part in parts]) for function in (np.min, np.mean, np.max))
    return np.array([x[part].mean() for part in parts]), of_y


def _is_per_cent(values: Sequence[float]) -> bool:
    finite = [value for value in values if np.isfinite(value)]
    return bool(finite) and min(finite) >= 0 and 1 < max(finite) <= 100


def _draw_measure(axes, name: str, points: Sequence[tuple[float, float]], best, **style) -> None:
    epochs, values = zip(*points, strict=True)
    finite = [point for point in points if np.isfinite(point[1])]
    label = name
    if finite:
        epoch, value = best(finite, key=lambda point: point[1])
        label = f'{name}: {"best" if best is max else "least"} {value:.4g} at {epoch:.4g}, last {values[-1]:.4g}'
    (line,) = axes.plot(epochs, values, marker='o' if len(points) <= 30 else None, label=label, **style)
    if finite:
        axes.plot(epoch, value, marker='*', markersize=12, color=line.get_color())


def prediction_grid(
    images: Sequence[Image.Image],
    labels: Sequence[int],
    predictions: Sequence[int],
    classes: Sequence[str],
    path: Path | str,
    columns: int = 10,
    rows: int = 6,
) -> None:
    """Images with their predicted classes; the wrong ones come first, in red frames, with both classes.

    What space is left shows right ones, evenly spread over the images.
    """
    wrong = [i for i in range(len(images)) if predictions[i] != labels[i]]
    right = [i for i in range(len(images)) if predictions[i] == labels[i]]
    space = max(0, columns * rows - len(wrong))
    spread = np.linspace(0, len(right) - 1, min(space, len(right))).astype(int)
    order = [*wrong[: columns * rows], *(right[i] for i in spread)]
    figure = Figure(figsize=(1.1 * columns, 1.3 * rows), layout='constrained')
    figure.suptitle(f'{len(right)} of {len(images)} right, {len(wrong)} wrong')
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.set(xticks=[], yticks=[], frame_on=False)
    for axes, i in zip(figure.axes, order, strict=False):
        is_right = predictions[i] == labels[i]
        colour = RIGHT if is_right else WRONG
        title = classes[predictions[i]] if is_right else f'{classes[predictions[i]]}, is {classes[labels[i]]}'
        axes.imshow(images[i], cmap='gray')
        axes.set_title(title, fontsize=9, color=colour)
        axes.set(frame_on=True)
        for spine in axes.spines.values():
            spine.set(color=colour, linewidth=1 if is_right else 3)
    figure.savefig(path, dpi=120)


def routed_regions(
    image: Image.Image,
    routes: Sequence[dict],
    query: tuple[float, float],
    path: Path | str,
    sample: int = 0,
) -> None:
    """Where a place of the image looks, a panel for each routing block.

    A block's map is taken to cover the image exactly: if it was padded to whole regions, they are drawn too small.

    Args:
        image: the image, of any size, cut to what the model saw of it.
        routes: of the images, as `BiFormer.routes` gives them: dicts of module, regions (rows, columns) and index.
        query: the place, as (y, x) in 0..1.
        path: the PNG to write.
        sample: which of the batch's images it is.
    """
    columns = min(4, len(routes))
    rows = -(-len(routes) // columns)
    figure = Figure(figsize=(2.8 * columns, 3 * rows), layout='constrained')
    figure.suptitle('blue: the query region; orange: regions that it attends to, stronger for better')
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.set_axis_off()
    for axes, route in zip(figure.axes, routes, strict=False):
        _draw_route(axes, image, route['regions'], route['index'][sample], query)
        axes.set_title(route['module'], fontsize=8)
    figure.savefig(path, dpi=120)


def _draw_route(axes, image: Image.Image, regions: tuple[int, int], index: Tensor, query: tuple[float, float]) -> None:
    rows, columns = regions
    height, width = image.height / rows, image.width / columns
    axes.imshow(image, cmap='gray', extent=(0, image.width, image.height, 0))
    axes.hlines(np.arange(rows + 1) * height, 0, image.width, color='gray', linewidth=0.5)
    axes.vlines(np.arange(columns + 1) * width, 0, image.height, color='gray', linewidth=0.5)

    def mark(region: int, **style) -> None:
        row, column = divmod(region, columns)
        axes.add_patch(Rectangle((column * width, row * height), width, height, **style))

    own = min(int(query[0] * rows), rows - 1) * columns + min(int(query[1] * columns), columns - 1)
    chosen = index[own].tolist()
    for rank, region in enumerate(chosen):
        mark(region, facecolor=ROUTED, edgecolor=ROUTED, alpha=0.65 - 0.45 * rank / len(chosen))
    mark(own, fill=False, edgecolor=QUERY, linewidth=3)
