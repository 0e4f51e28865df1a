"""Pictures of a run and of what a model looks at. Each function writes one PNG."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

__all__ = ['prediction_grid', 'routed_regions', 'training_curve']

RIGHT, WRONG, QUERY, ROUTED = '#2a7f3f', '#c62828', '#1565c0', '#ef6c00'


def training_curve(records: Sequence[dict], path: Path | str) -> None:
    """Loss and learning rate over epochs, and the measures of the validations; records as `records.read_curve` gives."""
    steps = [record for record in records if 'loss' in record]
    validations = [record for record in records if 'loss' not in record]
    figure = Figure(figsize=(11, 4), layout='constrained')
    left, right = figure.subplots(1, 2)
    left.plot([r['epoch'] for r in steps], [r['loss'] for r in steps], color=QUERY)
    left.set(xlabel='epoch', ylabel='training loss')
    rate = left.twinx()
    rate.plot([r['epoch'] for r in steps], [r['lr'] for r in steps], color=ROUTED, linestyle=':')
    rate.set_ylabel('learning rate', color=ROUTED)
    for measure in [key for key in validations[-1] if key not in ('iter', 'epoch')] if validations else ():
        right.plot([r['epoch'] for r in validations], [r[measure] for r in validations], marker='o', label=measure)
    if validations:
        right.legend()
    right.set(xlabel='epoch', ylabel='accuracy on test images (%)')
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


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
