from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from zoo.train.dense import pictures
from zoo.train.dense.pictures import DensePictures, draw, draw_all, palette
from zoo.train.registry import HOOKS

CLASSES = ['background', 'square', 'bar']


def sample(height=60, width=80):
    """A grey image of a square, its truth, and a prediction of it and of a bar."""
    image = torch.full((3, height, width), 90, dtype=torch.uint8)
    image[:, 20:40, 10:30] = 200
    masks = torch.zeros(2, height, width, dtype=torch.bool)
    masks[0, 20:40, 10:30] = True
    masks[1, 44:50, 40:75] = True
    truth = {
        'name': 'folder/scene.png',
        'boxes': tv_tensors.BoundingBoxes([[10.0, 20, 30, 40]], format='XYXY', canvas_size=(height, width)),
        'labels': torch.tensor([1]),
        'masks': tv_tensors.Mask(masks[:1].to(torch.uint8)),
    }
    prediction = {
        'boxes': torch.tensor([[11.0, 20, 30, 41], [40, 44, 75, 50]]),
        'labels': torch.tensor([1, 2]),
        'scores': torch.tensor([0.97, 0.3]),
        'masks': masks,
    }
    return image, prediction, truth


def map_sample(height=60, width=80):
    image = torch.full((3, height, width), 90, dtype=torch.uint8)
    truth = torch.zeros(height, width, dtype=torch.uint8)
    truth[20:40, 10:30] = 1
    truth[:6] = 255
    found = torch.zeros(height, width, dtype=torch.int64)
    found[20:40, 14:34] = 2
    return image, {'mask': found}, {'name': 'scene.png', 'mask': tv_tensors.Mask(truth)}


def drawn(draw, *arguments, **kwargs):
    """The path of a picture, and its pixels."""
    path = kwargs.pop('folder') / 'picture.png'
    draw(*arguments, CLASSES, path, **kwargs)
    return path, np.asarray(Image.open(path).convert('RGB')).astype(int)


def near(pixels, colour, distance=12):
    return int((np.abs(pixels - colour).max(axis=-1) <= distance).sum())


def test_a_palette_is_fixed_and_of_different_colours():
    colours = palette(150)
    assert colours.shape == (150, 3)
    assert len(np.unique(colours, axis=0)) == 150
    assert np.array_equal(palette(7), colours[:7])
    assert palette(0).shape == (0, 3)


def test_detections_below_the_threshold_are_not_drawn(tmp_path):
    colours = palette(3).astype(int)
    _, sure = drawn(draw, *sample(), folder=tmp_path)
    _, both = drawn(draw, *sample(), folder=tmp_path, threshold=0.2)
    assert near(sure, colours[1]) > 100  # boxes of the square in truth and prediction
    tint = 0.4 * 90 + 0.6 * colours[2]
    assert near(sure, colours[2]) == near(sure, tint) == 0
    assert min(near(both, colours[2]), near(both, tint)) > 100


def test_masks_are_tinted_in_their_class_colour(tmp_path):
    image, prediction, truth = sample()
    tint = 0.4 * 200 + 0.6 * palette(3)[1].astype(int)
    _, pixels = drawn(draw, image, prediction, truth, folder=tmp_path)
    without = [{key: value for key, value in found.items() if key != 'masks'} for found in (prediction, truth)]
    _, bare = drawn(draw, image, *without, folder=tmp_path)
    side = near(pixels, tint) ** 0.5
    assert side > 80  # two squares of a quarter of a panel's width
    assert near(bare, tint) < 0.01 * side**2


def test_maps_show_their_classes_and_leave_background_clear(tmp_path):
    _, pixels = drawn(draw, *map_sample(), folder=tmp_path)
    tints = 0.3 * 90 + 0.7 * palette(3).astype(int)
    square, bar = near(pixels, tints[1]), near(pixels, tints[2])
    assert square == pytest.approx(bar, rel=0.1)  # one in the truth, the other in the prediction
    assert square > 3000
    assert near(pixels, tints[0]) == 0
    assert near(pixels, 0.3 * 90 + 0.7 * 255) > 1000  # what doesn't count


def test_many_images_of_different_sizes_make_one_picture(tmp_path):
    samples = [sample(60, 80), sample(90, 50), sample(41, 120)]
    samples[1] = (samples[1][0][:1], *samples[1][1:])  # grey
    path, pixels = drawn(draw_all, samples, folder=tmp_path, title='After 3 iterations')
    assert Image.open(path).format == 'PNG'
    assert pixels.shape[1] > 1.5 * pixels.shape[0]
    with pytest.raises(ValueError, match='no samples'):
        draw_all([], CLASSES, path)


def test_nothing_found_is_a_picture_too(tmp_path):
    image, prediction, truth = sample()
    nothing = {key: value[:0] for key, value in prediction.items()}
    _, pixels = drawn(
        draw,
        image,
        nothing,
        {**truth, **{key: truth[key][:0] for key in ('boxes', 'labels', 'masks')}},
        folder=tmp_path,
    )
    assert near(pixels, palette(3)[1].astype(int)) == 0


def runner_in(folder):
    dataset = SimpleNamespace(metainfo={'classes': CLASSES})
    return SimpleNamespace(work_dir=str(folder), iter=40, val_dataloader=SimpleNamespace(dataset=dataset))


def validate(hook, runner, batches=3):
    hook.before_val_epoch(runner)
    for i in range(batches):
        images, predictions, truths = zip(sample(), sample(), strict=True)
        hook.after_val_iter(runner, i, (list(images), list(truths)), list(predictions))
    hook.after_val_epoch(runner, {})


def test_the_hook_draws_the_first_images_of_each_validation(tmp_path, monkeypatch):
    given = []
    draw_whole = pictures.draw_all
    monkeypatch.setattr(
        pictures,
        'draw_all',
        lambda samples, *rest, **more: given.append(list(samples)) or draw_whole(samples, *rest, **more),
    )
    hook = HOOKS.build({'type': 'DensePictures', 'count': 3})
    runner = runner_in(tmp_path)
    for _ in range(2):
        validate(hook, runner)
    assert [len(samples) for samples in given] == [3, 3]
    assert given[0][0][1]['scores'].tolist() == pytest.approx([0.97])  # no more is kept than is drawn
    assert [path.name for path in tmp_path.iterdir()] == ['predictions.png']
    assert hook.samples == []
    with pytest.raises(ValueError, match='count must be at least 1, got 0'):
        DensePictures(count=0)


def test_a_failure_leaves_the_last_picture(tmp_path, monkeypatch):
    hook, runner = DensePictures(), runner_in(tmp_path)
    validate(hook, runner, 1)
    before = (tmp_path / 'predictions.png').read_bytes()

    def fail(samples, classes, path, *rest, **more):
        path.write_bytes(b'half')
        raise ArithmeticError

    monkeypatch.setattr(pictures, 'draw_all', fail)
    with pytest.raises(ArithmeticError):
        validate(hook, runner, 1)
    assert (tmp_path / 'predictions.png').read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ['predictions.png']
