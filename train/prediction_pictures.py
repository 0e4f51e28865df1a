"""Pictures of predictions: what is taken for what, and images with what they are taken for. Each writes one PNG."""

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

__all__ = ['confusion', 'contact_sheet']

MOST_LISTED = 30  # classes whose names fit beside a matrix
CELLS = 50  # a side, of a matrix of more classes
PAIRS = 25


def confusion(labels: np.ndarray, predictions: np.ndarray, names: Mapping[int, str], path: Path | str) -> None:
    """Which classes are taken for which: a matrix, and the pairs that are most often confused.

    Of more than 30 classes, a cell of the matrix holds as many classes a side as make it 50 cells, in the order of
    their indices, which for ImageNet puts related classes side by side.

    Args:
        labels: class of each image, a key of `names`.
        predictions: class that it is taken for; others than the keys of `names` are left out of the matrix.
        names: of the classes, by their indices.
        path: the PNG to write.
    """
    order = sorted(names)
    places = {index: place for place, index in enumerate(order)}
    cells = len(order) if len(order) <= MOST_LISTED else min(CELLS, len(order))
    matrix = np.zeros((cells, cells))
    for label, prediction in zip(labels.tolist(), predictions.tolist(), strict=True):
        if prediction in places:
            matrix[places[label] * cells // len(order), places[prediction] * cells // len(order)] += 1
    matrix = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)

    figure = Figure(figsize=(17, 8.5), layout='constrained')
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    drawn = left.imshow(matrix ** (1 / 2), cmap='magma_r', vmin=0, vmax=10, interpolation='nearest')
    bar = figure.colorbar(drawn, ax=left, shrink=0.8, label="% of the row's images")
    marks = (0, 1, 5, 10, 25, 50, 75, 100)
    bar.set_ticks([mark ** (1 / 2) for mark in marks], labels=marks)
    if cells == len(order) <= MOST_LISTED:
        shown = [textwrap.shorten(names[index], 24, placeholder='…') for index in order]
        left.set_xticks(range(cells), shown, rotation=90)
        left.set_yticks(range(cells), shown)
        if cells <= 12:
            for row, column in np.argwhere(matrix >= 0.5):
                share = matrix[row, column]
                colour = 'white' if share > 40 else 'black'
                left.text(column, row, f'{share:.0f}', ha='center', va='center', color=colour)
    else:
        places_shown = np.linspace(0, cells - 1, 6).astype(int)
        indices = [order[place * len(order) // cells] for place in places_shown]
        left.set_xticks(places_shown, indices)
        left.set_yticks(places_shown, indices)
    left.set(xlabel='predicted class', ylabel='class', title=f'{len(order)} classes, {len(labels)} images')
    _pairs(right, labels, predictions, names)
    figure.savefig(path, dpi=110, format='png')


def _pairs(axes, labels: np.ndarray, predictions: np.ndarray, names: Mapping[int, str]) -> None:
    pairs = Counter(
        (label, taken) for label, taken in zip(labels.tolist(), predictions.tolist(), strict=True) if label != taken
    )
    totals = Counter(labels.tolist())
    most = pairs.most_common(PAIRS)
    axes.barh(range(len(most)), [100 * count / totals[label] for (label, _), count in most], color='#ef6c00')
    shown = [
        f'{textwrap.shorten(names[label], 26, placeholder="…")} → '
        f'{textwrap.shorten(names.get(taken, "none"), 26, placeholder="…")}  ({count})'
        for (label, taken), count in most
    ]
    axes.set_yticks(range(len(most)), shown, fontsize=8)
    axes.set_ylim(PAIRS, -1)
    axes.set(xlabel="% of the class's images", title='Most often confused: class → prediction (images)')


def contact_sheet(
    images: Sequence[Image.Image | None], captions: Sequence[str], path: Path | str, title: str = '', columns: int = 5
) -> None:
    """Images with captions of some lines; a grey field where an image is None."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    lines = max(caption.count('\n') + 1 for caption in captions)
    figure = Figure(figsize=(3 * columns, (2.7 + 0.19 * lines) * rows + 0.5), layout='constrained')
    figure.suptitle(title)
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.set_axis_off()
    for axes, image, caption in zip(figure.axes, images, captions, strict=False):
        axes.imshow(Image.new('RGB', (224, 224), 'lightgrey') if image is None else image, cmap='gray')
        axes.set_title(caption, fontsize=9, loc='left')
    figure.savefig(path, dpi=100, format='png')
