"""Checks of what the data is, and of what loading and augmentation make of it."""

import collections
import copy
import functools
import hashlib
import itertools
import os
import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data import LEFT_OUT
from ..seeding import seed_everything
from . import probes
from .checks import check, error, names, number, ok, require, stated, warning
from .findings import Finding
from .rehearsal import Rehearsal

SAMPLED = 64  # images whose labels are read
HASHED = 256  # validation images that are looked for in the training data
IMBALANCE = 20  # images of the most frequent class for one of the rarest
DRAWS = 8  # of one image, half of them in the first epoch and half in the second
FOLLOWED = 200_000  # draws of the order, at most
RANKS = 4  # processes whose draws are compared, at most


@check(needs='data')
def classes(run: Rehearsal) -> Finding:
    """The classes of training, validation and model: the same, in the same order."""
    train, count = run.train_loader.dataset, getattr(run.task, 'num_classes', None)
    listed = _classes(train)
    require(listed and count, 'the data names no classes')
    expected = f'model: {count} classes'
    if len(listed) != count:
        return error(
            f'{len(listed)} classes in the training data', expected, f'Set num_classes={len(listed)} in model.backbone.'
        )
    if run.val_loader is not None:
        others = _classes(run.val_loader.dataset)
        if listed != others:
            position = next((i for i, pair in enumerate(zip(listed, others, strict=False)) if pair[0] != pair[1]), None)
            what = (
                f'{len(others)} classes in validation'
                if position is None
                else f'class {position} is {listed[position]!r} in training and {others[position]!r} in validation'
            )
            return error(what, expected, 'Give both parts the same class folders, in the same order.')
    return ok(f'{len(listed)}: {names(listed)}', expected)


def _classes(dataset) -> list:
    return list((getattr(dataset, 'metainfo', None) or {}).get('classes') or ())


@check(needs='data', of='labels')
def labels(run: Rehearsal) -> Finding:
    """Labels within the model's classes, and each that of the folder its image lies in."""
    require(run.batches and isinstance(run.batches[0][1], Tensor), 'the batches are no images with labels')
    count = run.task.num_classes
    expected = f'0 to {count - 1}, as the class folders are sorted'
    seen = torch.cat([batch[1].flatten() for batch in run.batches])
    if seen.is_floating_point():
        return ok(f'probabilities, {tuple(run.batches[0][1].shape)}')
    low, high = int(seen.min()), int(seen.max())
    if low < 0 or high >= count:
        return error(
            f'{low} to {high} in two batches',
            expected,
            'Labels must count from 0: check the dataset for labels off by one.',
        )
    meanings = {}
    for part, loader in (('training', run.train_loader), ('validation', run.val_loader)):
        dataset = loader.dataset if loader is not None else None
        for index, label, folder in _folders(dataset):
            listed = _classes(dataset)
            meant = listed[label] if 0 <= label < len(listed) else None
            if meant != folder:
                return error(
                    f'{part} image {index} of folder {folder!r} has label {label}, which is {meant!r}',
                    expected,
                    'The dataset gives labels off by some classes, or of another order of the classes.',
                )
            meanings.setdefault(label, {}).setdefault(folder, part)
    twofold = next((found for found in meanings.values() if len(found) > 1), None)
    if twofold:
        what = ' and '.join(f'{folder!r} in {part}' for folder, part in twofold.items())
        return error(f'one label means {what}', expected, 'Training and validation number the classes differently.')
    checked = f', {len(meanings)} classes compared with their folders' if meanings else ''
    return ok(f'{low} to {high} in two batches{checked}', expected)


def _folders(dataset) -> list[tuple[int, int, str]]:
    """(index, label that the dataset gives, class folder) of a few images in folders."""
    reader = getattr(dataset, 'reader', None)
    if reader is None or not getattr(reader, 'class_to_idx', None) or not _classes(dataset):
        return []
    count = len(dataset)
    indices = sorted(random.Random(0).sample(range(count), min(count, SAMPLED // 2)))
    light = copy.copy(dataset)
    light.transform = lambda image: image
    found = [(index, int(light[index][1]), Path(reader.filename(index)).parent.name) for index in indices]
    skips = getattr(dataset, 'on_error', None) == 'skip'
    return [each for each in found if not (skips and each[1] == LEFT_OUT)]


@check(needs='data', of='labels')
def class_balance(run: Rehearsal) -> Finding:
    """Images of each class in the training data."""
    found = _all_labels(run.train_loader.dataset)
    require(found, 'the labels can not be listed without reading the images')
    counts = collections.Counter(found)
    missing = [label for label in range(run.task.num_classes) if label not in counts]
    most, least = max(counts.values()), min(counts.values())
    text = f'{len(found):,} images, {least:,} to {most:,} a class'
    if missing:
        return warning(f'{text}; none of {names(missing)}', 'every class', 'Classes without images are never learnt.')
    if most > IMBALANCE * least:
        return warning(
            text,
            f'at most {IMBALANCE} to 1',
            'Rare classes hardly count in the loss: resample, weight the loss, or silence this if it is meant.',
        )
    return ok(text)


def _all_labels(dataset) -> list[int]:
    samples = getattr(getattr(dataset, 'reader', None), 'samples', None)
    return [int(sample[1]) for sample in samples] if isinstance(samples, list) and samples else []


@check(needs='data')
def order(run: Rehearsal) -> Finding:
    """The order of the training images: shuffled, each seen, another order each epoch."""
    sampler = run.train_loader.sampler
    drawn = len(sampler)
    expected = 'shuffled anew each epoch'
    first, second = (_draws(sampler, epoch, min(drawn, FOLLOWED)) for epoch in (0, 1))
    indices = [_index(draw) for draw in first]
    distinct = len(set(indices))
    dropped = drawn % run.train_loader.batch_size if run.train_loader.drop_last else 0
    text = f'{drawn:,} draws an epoch and process'
    if drawn <= FOLLOWED:
        text += f' of {distinct:,} images'
    repeats = _repeats(sampler, first)
    text += f', each image {repeats} times among the processes (repeated augmentation)' if repeats > 1 else ''
    text += f'; {dropped} draws in no batch' if dropped else ''
    head = indices[: max(2 * run.train_loader.batch_size, 16)]
    cause = "Shuffle the training data: sampler=dict(type='ShuffledStream')."
    rising = sum(a <= b for a, b in itertools.pairwise(head))
    if len(head) > 8 and rising > 0.9 * (len(head) - 1):
        return warning(f'images in the order of the files: {names(head, 5)}', expected, cause)
    batch = run.batches[0][1] if run.batches and isinstance(run.batches[0][1], Tensor) else None
    is_mixed = batch is None or batch.is_floating_point() or len(batch) < 8 or run.task.num_classes < 2
    if not is_mixed and len(batch.unique()) == 1:
        return warning('the first batch has one class only', expected, cause)
    if second and [_index(draw) for draw in second] == indices and distinct > 8:
        return warning('the second epoch has the order of the first', expected, 'The sampler needs a seed per epoch.')
    return ok(text, expected)


def _repeats(sampler, draws: list) -> int:
    """How often an image is drawn by the processes together, judging by the first draws of a few of them."""
    size = min(len(sampler), 256)
    seen = collections.Counter(map(_index, draws[:size]))
    for rank in range(1, min(getattr(sampler, 'world_size', 1), RANKS)):
        other = copy.copy(sampler)
        other.rank = rank
        seen.update(map(_index, _draws(other, 0, size)))
    return collections.Counter(seen.values()).most_common(1)[0][0]


def _draws(sampler, epoch: int, count: int) -> list:
    """The first draws of this process in an epoch."""
    copied = copy.copy(sampler)
    if hasattr(copied, 'start'):  # an endless stream
        copied.start = epoch * len(copied)
        return list(itertools.islice(iter(copied), count))
    if hasattr(copied, 'set_epoch'):
        copied.set_epoch(epoch)
    elif epoch:
        return []
    return list(itertools.islice(iter(copied), count))


def _index(draw) -> int:
    return draw[0] if isinstance(draw, tuple | list) else draw


@check(needs='data', of='labels')
def augmentation(run: Rehearsal) -> Finding:
    """What the training transform makes of one image: differs from draw to draw and from epoch to epoch."""
    dataset, sampler = run.train_loader.dataset, run.train_loader.sampler
    probe = probes.with_images(dataset, [probes.coordinates()])
    require(probe is not None, 'the dataset has no reader to give an image to')
    draws = [draw for epoch in (0, 1) for draw in _draws(sampler, epoch, DRAWS // 2)]
    require(len(draws) > 1, 'the training data has one image only')
    seed_everything(0)
    outputs = [to_pixels(probe[(0, *draw[1:]) if isinstance(draw, tuple) else 0][0]) for draw in draws]
    different = len({output.tobytes() for output in outputs})
    shown = [probes.covered(output) for output in outputs if output.ndim == 3 and output.shape[0] == 3]
    flipped = sum(width < 0 for width, _ in shown)
    areas = [abs(width * height) for width, height in shown]
    text = f'{different} of {len(draws)} draws of an image differ'
    if areas:
        text += f'; {flipped} flipped, {min(areas):.0%} to {max(min(1, area) for area in areas):.0%} of the image shown'
    if different == 1:
        image = probe.read(0)[0]
        alone = set()
        for seed in range(DRAWS):
            seed_everything(seed, 1)
            alone.add(to_pixels(dataset.transform(image)).tobytes())
        if len(alone) > 1:
            return warning(
                f'all {len(draws)} draws of an image are the same',
                'random transforms',
                'Every sample gets the same random numbers: seed each draw by its own key, not by a constant.',
            )
        return ok('none: training images are always transformed alike')
    return ok(text)


def to_pixels(image) -> np.ndarray:
    return image.detach().numpy() if isinstance(image, Tensor) else np.asarray(image)


@check(needs='data')
def overlap(run: Rehearsal) -> Finding:
    """Validation images that are training images, byte for byte, among a sample."""
    require(run.val_loader is not None, 'there is no validation')
    readers = [getattr(loader.dataset, 'reader', None) for loader in (run.train_loader, run.val_loader)]
    require(all(isinstance(getattr(reader, 'samples', None), list) for reader in readers), 'images are not in files')
    train, val = ([str(sample[0]) for sample in reader.samples] for reader in readers)
    require(train and val and Path(train[0]).is_file(), 'images are not in files')
    rng = random.Random(0)
    sample = rng.sample(val, min(len(val), HASHED))
    # Of the training images, those of the same name, and of a sample those of the same size.
    wanted = {os.path.basename(path) for path in sample}
    by_name = {}
    for path in train:
        name = os.path.basename(path)
        if name in wanted:
            by_name.setdefault(name, []).append(path)
    sizes = {}
    for path in rng.sample(train, min(len(train), 20 * HASHED)):
        sizes.setdefault(Path(path).stat().st_size, []).append(path)
    doubled = []
    for path in sample:
        candidates = {*by_name.get(os.path.basename(path), ())[:4], *sizes.get(Path(path).stat().st_size, ())[:20]}
        own = _digest(path) if candidates else None
        if any(_digest(candidate) == own for candidate in candidates):
            doubled.append(path)
    if doubled:
        return warning(
            f'{len(doubled)} of {len(sample)} validation images are training images too: {names(doubled, 1)}',
            'none in common',
            'Its measures would be those of what the model has learnt by heart: keep the parts apart.',
        )
    return ok(f'none of {len(sample)} validation images', 'none in common')


@functools.lru_cache(maxsize=40 * HASHED)
def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@check(needs='data', of='labels')
def image_size(run: Rehearsal) -> Finding:
    """The size of training and validation images that reach the model."""
    require(run.batches and run.batches[0][0].ndim == 4, 'the batches are no images with labels')
    sizes = {tuple(batch[0].shape[-2:]) for batch in run.batches}
    text = 'training ' + ', '.join(f'{height} x {width}' for height, width in sizes)
    val = {tuple(batch[0].shape[-2:]) for batch in run.val_batches}
    if val:
        text += ', validation ' + ', '.join(f'{height} x {width}' for height, width in val)
    size, source = stated(run, 'image_size')
    if size is None:
        return ok(text)
    size = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    expected = f'{source}: {size[0]} x {size[1]}'
    if sizes | val != {size}:
        return warning(text, expected, "Set the sizes in the dataloaders' transforms.")
    return ok(text, expected)


@check(needs='data', of='labels')
def test_crop(run: Rehearsal) -> Finding:
    """The share of an image's side that the validation transform shows, measured, and its interpolation."""
    require(run.val_loader is not None, 'there is no validation')
    probe = probes.with_images(run.val_loader.dataset, [probes.coordinates(), probes.edge()])
    require(probe is not None, 'the dataset has no reader to give an image to')
    shown, edge = to_pixels(probe[0][0]), to_pixels(probe[1][0])
    require(shown.ndim == 3 and shown.shape[0] == 3, 'images are not (3, H, W)')
    if shown.dtype != np.uint8 and shown.max() <= 1.5:
        shown, edge = 255 * shown, 255 * edge
    width, height = probes.side_covered(shown)
    interpolation = probes.interpolation_of(edge)
    text = f'{width:.3f} of the width, {height:.3f} of the height, {interpolation}'
    crop, interpolates = run.recipe.get('crop_pct'), run.recipe.get('interpolation')
    expected = ', '.join(f'recipe: {number(value)}' for value in (crop, interpolates) if value is not None)
    if crop is not None and max(abs(width - crop), abs(height - crop)) > 0.012:
        return warning(
            text,
            expected,
            f'Resize the shorter side to the crop size / {crop:g} before the centre crop, in val_dataloader.',
        )
    if interpolates is not None and interpolates.replace('lanczos', 'bicubic') != interpolation:
        return warning(text, expected, f'Set the interpolation of the validation transform to {interpolates}.')
    return ok(text, expected)
