"""Predictions written down: tables, a picture, and the list of images that could not be read."""

import csv
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

from . import prediction_pictures
from .checkpoints import write_atomically
from .images import write_broken
from .inference import Prediction

__all__ = ['draw', 'write_csv', 'write_jsonl', 'write_unreadable']

DRAWN = 100  # images, at most
THUMBNAIL = (224, 224)
CAPTION = 38  # characters of a line


def write_csv(predictions: Sequence[Prediction], path: Path | str) -> None:
    """A line for each image and class: file, rank (from 1), class, index, probability; and error."""
    rows = [('file', 'rank', 'class', 'index', 'probability', 'error')]
    for each in predictions:
        named = zip(each.classes, each.indices, each.probabilities, strict=True)
        rows += [(each.name, rank, *values, '') for rank, values in enumerate(named, start=1)]
        if each.error is not None:
            rows.append((each.name, '', '', '', '', each.error))

    def write(temporary: Path) -> None:
        with open(temporary, 'w', newline='', encoding='utf-8') as file:
            csv.writer(file).writerows(rows)

    write_atomically(path, write)


def write_jsonl(predictions: Sequence[Prediction], path: Path | str) -> None:
    """A line for each image: {file, classes, indices, probabilities, error}."""
    keys = ('classes', 'indices', 'probabilities', 'error')
    rows = [{'file': each.name} | {key: getattr(each, key) for key in keys} for each in predictions]
    lines = [json.dumps(row, ensure_ascii=False) + '\n' for row in rows]
    write_atomically(path, lambda temporary: temporary.write_text(''.join(lines), encoding='utf-8'))


def write_unreadable(predictions: Sequence[Prediction], path: Path | str) -> None:
    """A line for each image that can't be read: name, tab, reason."""
    write_broken(path, [(each.name, each.error) for each in predictions if each.error is not None])


def draw(predictions: Sequence[Prediction], path: Path | str) -> None:
    """A picture of the first 100 images, each with its three most probable classes or why it can't be read."""
    shown = predictions[:DRAWN]
    images, captions = [], []
    for each in shown:
        image = None
        lines = [Path(each.name).name]
        if each.error is None:
            image = each.image.read()
            image.thumbnail(THUMBNAIL)
            likely = zip(each.classes[:3], each.probabilities, strict=False)
            lines += [f'{100 * probability:5.1f} %  {name.partition(",")[0]}' for name, probability in likely]
        else:
            lines.append(each.error)
        images.append(image)
        captions.append('\n'.join(textwrap.shorten(line, CAPTION, placeholder='…') for line in lines))
    title = '' if len(shown) == len(predictions) else f'the first {len(shown)} of {len(predictions)} images'
    write_atomically(path, lambda temporary: prediction_pictures.contact_sheet(images, captions, temporary, title))
