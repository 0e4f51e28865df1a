"""What measures of dense prediction share: results by image, each counted once, and tables of the classes."""

import csv
import math
import sys
from collections.abc import Hashable, Sequence
from pathlib import Path

from mmengine.dist import collect_results
from mmengine.evaluator import BaseMetric
from rich.console import Console
from rich.table import Table

from ..checkpoints import write_atomically
from ..distributed import on_first

__all__ = ['ImageMetric', 'listed']

NAMED = 5  # images that an error lists


class ImageMetric(BaseMetric):
    """A measure whose results are pairs of what tells an image from the others and what is known of it.

    However the images are shared among processes, padded to even numbers or in uneven ones, each counts once: mmengine
    itself drops what comes last, and has to trust that this is the padding. An error of the first process, which
    computes, is an error of all.

    Args:
        per_class: print a table of the classes.
        out: folder to write results to; nothing is written if None.

    Attributes:
        classes: the table of the last evaluation, on the first process: a dict of each class, its `class` (the name)
            first.
    """

    default_prefix = ''  # mmengine warns of None

    def __init__(self, per_class: bool = False, out: Path | str | None = None, collect_device: str = 'gpu', **kwargs):
        # mmengine's 'cpu' gathers through files in the current folder, its 'gpu' through the process group of any kind.
        super().__init__(collect_device=collect_device, **kwargs)
        self.per_class = per_class
        self.out = None if out is None else Path(out).expanduser()
        self.classes: list[dict] = []

    def evaluate(self, size: int) -> dict[str, float]:
        """The measures, on every process, of all images that any of them has processed since the last time.

        Raises:
            ValueError: they are not `size` different ones.
        """
        results = collect_results(self.results, sys.maxsize, self.collect_device)
        self.results.clear()
        metrics = on_first(self._evaluate, results, size)
        return {f'{self.prefix}/{name}': value for name, value in metrics.items()} if self.prefix else metrics

    def _evaluate(self, results: list[tuple[Hashable, object]], size: int) -> dict[str, float]:
        unique = {key: (key, value) for key, value in reversed(results)}  # the first of each
        self.check_images(unique.keys(), size)
        return self.compute_metrics(list(unique.values()))

    def check_images(self, keys, size: int) -> None:
        """ValueError if these are not the images of the dataset, which has `size`."""
        if len(keys) != size:
            raise ValueError(
                f'The dataset has {size} images, but there are results of {len(keys)} different ones: some were not '
                f'evaluated, or share a name. There are {listed(sorted(map(str, keys)))}.'
            )

    def show(self, title: str, file: str) -> None:
        """Print and write the table of classes, as it is asked for; numbers with two digits, NaN as nothing."""
        names = list(self.classes[0]) if self.classes else []
        rows = [[_cell(value) for value in row.values()] for row in self.classes]
        if self.per_class:
            table = Table(title=title, title_justify='left')
            for i, name in enumerate(names):
                table.add_column(name, justify='right' if i else 'left')
            for row in rows:
                table.add_row(*row)
            Console().print(table)
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            write_atomically(self.out / file, lambda path: _write_csv(path, [names, *rows]))


def listed(names: Sequence[str]) -> str:
    """The first few of many names, for people."""
    more = f' and {len(names) - NAMED} more' if len(names) > NAMED else ''
    return ', '.join(names[:NAMED]) + more


def _cell(value) -> str:
    if isinstance(value, float):
        return '' if math.isnan(value) else f'{value:.2f}'
    return str(value)


def _write_csv(path: Path, table: list[list]) -> None:
    with open(path, 'w', newline='', encoding='utf-8') as file:
        csv.writer(file).writerows(table)
