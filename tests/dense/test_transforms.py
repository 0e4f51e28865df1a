import numpy as np
import pytest
import torch
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from torchvision import tv_tensors

from zoo.train.data import build_transform
from zoo.train.dense.transforms import PhotometricDistortion, RandomCropMax
from zoo.train.registry import TRANSFORMS
from zoo.train.seeding import seed_everything

ONE_X = [{'type': 'ResizeKeepRatio', 'scale': (133, 80)}, {'type': 'RandomHorizontalFlip'}]
SIDES = [48, 51, 54, 57, 60, 64, 67, 70, 74, 77, 80]
MULTI_SCALE = [
    {'type': 'RandomHorizontalFlip'},
    {
        'type': 'RandomChoice',
        'transforms': [
            {'type': 'RandomChoiceResize', 'scales': [(side, 133) for side in SIDES]},
            [
                {'type': 'RandomChoiceResize', 'scales': [(40, 420), (50, 420), (60, 420)]},
                {'type': 'RandomCropSize', 'sides': (38, 60)},
                {'type': 'RandomChoiceResize', 'scales': [(side, 133) for side in SIDES]},
            ],
        ],
    },
]
LARGE_SCALE_JITTER = [
    {'type': 'RandomResizeRatio', 'scale': (96, 96), 'ratio': (0.1, 2.0)},
    {'type': 'RandomCropMax', 'size': (96, 96), 'boxes_from_masks': True},
    {'type': 'RandomHorizontalFlip'},
    {'type': 'PadTo', 'size': 96},
]
SEGMENTATION = [
    {'type': 'RandomResizeRatio', 'scale': (256, 64), 'ratio': (0.5, 2.0)},
    {'type': 'RandomCropMax', 'size': 64, 'cat_max_ratio': 0.75},
    {'type': 'RandomHorizontalFlip'},
    {'type': 'PhotometricDistortion'},
    {'type': 'PadTo', 'size': (64, 64)},
]


def boxes_around(masks):
    boxes = []
    for mask in masks:
        y, x = mask.nonzero(as_tuple=True)
        boxes.append([x.min(), y.min(), x.max() + 1, y.max() + 1])
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


def detection_sample(seed=0, height=61, width=83, count=5):
    """Ellipses in boxes of whole pixels, on an image whose red is the number of the topmost object and 1."""
    generator = np.random.default_rng(seed)
    masks = torch.zeros(count, height, width, dtype=torch.uint8)
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing='ij')
    for mask in masks:
        h, w = generator.integers(4, height), generator.integers(4, width)
        top, left = generator.integers(0, height - h + 1), generator.integers(0, width - w + 1)
        mask[((2 * y - 2 * top - h) / h) ** 2 + ((2 * x - 2 * left - w) / w) ** 2 <= 1] = 1
    image = torch.from_numpy(generator.integers(0, 256, (3, height, width), dtype=np.uint8))
    target = {
        'name': 'a',
        'image_id': 3,
        'boxes': tv_tensors.BoundingBoxes(boxes_around(masks), format='XYXY', canvas_size=(height, width)),
        'labels': torch.arange(10, 10 + count),
        'masks': tv_tensors.Mask(masks),
    }
    return tv_tensors.Image(image), target


def segmentation_sample(height=61, width=83):
    """The classes are the image's red, so that both must move together; 255 counts nowhere."""
    classes = torch.arange(height)[:, None] // 8 + torch.arange(width)[None] // 16 * 8
    image = classes.repeat(3, 1, 1).to(torch.uint8)
    return tv_tensors.Image(image), {'name': 'a', 'mask': tv_tensors.Mask(image[0].clone())}


def apply(steps, sample, *key):
    transform = build_transform(steps)
    seed_everything(*key)
    return transform(*sample)


def masks_are_in_boxes(target, by):
    for mask, (x0, y0, x1, y1) in zip(target['masks'], target['boxes'].tolist(), strict=True):
        y, x = mask.as_subclass(torch.Tensor).nonzero(as_tuple=True)
        assert x0 - by <= x.min()
        assert x.max() + 1 <= x1 + by
        assert y0 - by <= y.min()
        assert y.max() + 1 <= y1 + by


# A mask's edge may lie half a pixel over its box; half a pixel of the first resize is up to 133/38/2 after the second.
@pytest.mark.parametrize(
    ('steps', 'over'),
    [(ONE_X, 0.5), (MULTI_SCALE, 0.5 + 133 / 38 / 2), (LARGE_SCALE_JITTER, 0)],
    ids=['1x', 'multi-scale', 'jitter'],
)
def test_recipes_of_detection_keep_boxes_masks_and_labels_together(steps, over):
    sizes, counts = set(), set()
    for draw in range(40):
        image, target = apply(steps, detection_sample(draw), 0, draw)
        height, width = image.shape[-2:]
        sizes.add((height, width))
        counts.add(len(target['labels']))
        assert (type(image), image.dtype) == (tv_tensors.Image, torch.uint8)
        assert target['boxes'].canvas_size == (height, width)
        assert target['masks'].shape == (len(target['labels']), height, width)
        assert target['boxes'].shape == (len(target['labels']), 4)
        assert target['masks'].dtype == torch.uint8
        assert target['boxes'].dtype == torch.float32
        assert (target['boxes'][:, 2:] > target['boxes'][:, :2]).all()
        assert (target['boxes'] >= 0).all()
        assert (target['boxes'][:, 2:] <= torch.tensor([width, height])).all()
        masks_are_in_boxes(target, over + 1e-3)
        assert (target['name'], target['image_id']) == ('a', 3)
    assert len(sizes) > 5 or steps is not MULTI_SCALE
    assert len(counts) > 1 or steps is ONE_X


def test_the_recipe_of_segmentation_moves_image_and_map_together():
    steps = [step for step in SEGMENTATION if step['type'] != 'PhotometricDistortion']
    shares = []
    for draw in range(30):
        image, target = apply([*steps[:-1], {**steps[-1], 'fill': 255}], segmentation_sample(), 1, draw)
        assert image.shape == (3, 64, 64)
        assert target['mask'].shape == (64, 64)
        assert target['mask'].dtype == torch.uint8
        away = (image[0].int() - target['mask'].int()).abs()  # edges of classes are interpolated in the image
        shares.append((away > 0).float().mean())
    assert max(shares) < 0.35
    assert min(shares) < 0.15
    image, target = apply(SEGMENTATION, segmentation_sample(), 2)
    assert image.dtype == torch.uint8


def test_the_same_key_draws_the_same_numbers():
    for steps in (MULTI_SCALE, LARGE_SCALE_JITTER):
        first, again = (apply(steps, detection_sample(), 5, 6) for _ in range(2))
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1]['boxes'], again[1]['boxes'])
        assert torch.equal(first[1]['masks'], again[1]['masks'])


def test_a_flip_twice_is_the_identity():
    image, target = detection_sample()
    once, twice = (apply([{'type': 'RandomHorizontalFlip', 'p': 1.0}] * n, (image, target)) for n in (1, 2))
    assert torch.equal(once[0], image.flip(-1))
    assert torch.equal(once[1]['masks'], target['masks'].flip(-1))
    assert torch.equal(once[1]['boxes'], boxes_around(once[1]['masks'].as_subclass(torch.Tensor)))
    assert torch.equal(twice[0], image)
    assert all(torch.equal(twice[1][key], target[key]) for key in ('boxes', 'masks', 'labels'))


# Sizes


@pytest.mark.parametrize(
    ('size', 'scale', 'expected'),
    [
        ((480, 640), (1333, 800), (800, 1067)),  # as mmdetection makes COCO's usual size
        ((427, 640), (1333, 800), (800, 1199)),
        ((640, 427), (1333, 800), (1199, 800)),
        ((400, 1000), (1333, 800), (533, 1333)),
        ((480, 640), (800, 1333), (800, 1067)),
        ((683, 512), (2048, 512), (683, 512)),  # as mmsegmentation leaves a short side of 512
        ((1, 3000), (100, 100), (1, 100)),
    ],
)
def test_sizes_are_those_of_mmdetection(size, scale, expected):
    image, target = apply([{'type': 'ResizeKeepRatio', 'scale': scale}], detection_sample(0, *size, count=0))
    assert image.shape[-2:] == expected
    assert target['masks'].shape == (0, *expected)


def test_resized_masks_and_boxes_stay_where_the_image_has_their_object():
    """The middle of a mask's pixels is that of its object in the image: nothing moves by half a pixel."""
    height, width = 60, 80
    mask = torch.zeros(1, height, width, dtype=torch.uint8)
    mask[0, 11:34, 20:53] = 1
    image = tv_tensors.Image(mask.repeat(3, 1, 1) * 255)
    target = {
        'boxes': tv_tensors.BoundingBoxes([[20.0, 11, 53, 34]], format='XYXY', canvas_size=(height, width)),
        'labels': torch.tensor([0]),
        'masks': tv_tensors.Mask(mask),
    }
    for scale in ((120, 120), (56, 56), (200, 200), (27, 27)):
        resized, own = apply([{'type': 'ResizeKeepRatio', 'scale': scale}], (image, target))
        weight = resized[0].float() / 255
        for axis in (0, 1):
            place = torch.arange(weight.shape[axis]) + 0.5
            in_image = (weight.sum(1 - axis) * place).sum() / weight.sum()
            in_mask = (own['masks'][0].float().sum(1 - axis) * place).sum() / own['masks'].sum()
            in_box = (own['boxes'][0, 1 - axis] + own['boxes'][0, 3 - axis]) / 2
            assert abs(in_image - in_mask) < 0.3
            assert abs(in_image - in_box) < 0.05


def test_scales_are_drawn_from_all_that_are_given():
    scales = [(40, 60), (50, 75), (60, 90)]
    sizes = {
        apply([{'type': 'RandomChoiceResize', 'scales': scales}], segmentation_sample(40, 60), draw)[0].shape[-2:]
        for draw in range(30)
    }
    assert sizes == {(40, 60), (50, 75), (60, 90)}


def test_ratios_are_drawn_from_the_whole_range():
    step = {'type': 'RandomResizeRatio', 'scale': (160, 40), 'ratio': (0.5, 2.0)}
    heights = [apply([step], segmentation_sample(40, 80), draw)[0].shape[-2] for draw in range(100)]
    assert 20 <= min(heights) < 24
    assert 74 < max(heights) <= 80
    assert 45 < np.mean(heights) < 55  # of a uniform ratio: 50


def test_padding_is_right_and_below_and_counts_nowhere():
    image, target = segmentation_sample(30, 40)
    padded, own = apply([{'type': 'PadTo', 'size': (50, 35)}], (image, target))
    assert padded.shape == (3, 50, 40)
    assert torch.equal(padded[:, :30], image)
    assert padded[:, 30:].flatten(1).unique(dim=1).flatten().tolist() == [124, 116, 104]
    assert torch.equal(own['mask'][:30], target['mask'])
    assert (own['mask'][30:] == 255).all()
    image, target = detection_sample(0, 30, 40)
    padded, own = apply([{'type': 'PadTo', 'size': 64, 'fill': 0}], (image, target))
    assert not padded[:, 30:].any()
    assert own['masks'].sum() == target['masks'].sum()
    assert own['boxes'].canvas_size == (64, 64)
    assert torch.equal(own['boxes'], target['boxes'])


# Crops


def test_a_crop_is_the_slice_of_all():
    image, target = detection_sample(3)
    found = 0
    for draw in range(20):
        cropped, own = apply([{'type': 'RandomCropMax', 'size': (30, 40)}], (image, target), draw)
        assert cropped.shape == (3, 30, 40)
        places = [
            (top, left)
            for top in range(61 - 30 + 1)
            for left in range(83 - 40 + 1)
            if torch.equal(image[:, top : top + 30, left : left + 40], cropped)
        ]
        ((top, left),) = places
        sliced = target['masks'][:, top : top + 30, left : left + 40].as_subclass(torch.Tensor)
        boxes = target['boxes'].as_subclass(torch.Tensor) - torch.tensor([left, top, left, top])
        boxes[:, 0::2] = boxes[:, 0::2].clamp(0, 40)
        boxes[:, 1::2] = boxes[:, 1::2].clamp(0, 30)
        kept = sliced.flatten(1).any(dim=1).bool() & (boxes[:, 2:] - boxes[:, :2] >= 1).all(dim=1)
        assert torch.equal(own['labels'], target['labels'][kept])
        assert torch.equal(own['masks'], sliced[kept])
        assert torch.equal(own['boxes'], boxes[kept])
        found += len(own['labels'])
    assert found


def test_crops_reach_every_border():
    classes = torch.arange(12).reshape(3, 4)
    sample = tv_tensors.Image(classes.repeat(3, 1, 1).to(torch.uint8)), {'mask': tv_tensors.Mask(classes)}
    corners = {int(apply([{'type': 'RandomCropMax', 'size': 2}], sample, draw)[1]['mask'][0, 0]) for draw in range(60)}
    assert corners == {0, 1, 2, 4, 5, 6}


def test_boxes_may_be_drawn_anew_around_what_is_left_of_the_masks():
    for draw in range(20):
        steps = [{'type': 'RandomCropSize', 'sides': (20, 40), 'boxes_from_masks': True}]
        _, own = apply(steps, detection_sample(draw), draw)
        assert torch.equal(own['boxes'], boxes_around(own['masks'].as_subclass(torch.Tensor)))
        assert own['boxes'].dtype == torch.float32


def test_sides_of_a_crop_are_drawn_by_themselves():
    shapes = [
        apply([{'type': 'RandomCropSize', 'sides': (20, 70)}], segmentation_sample(), draw)[0].shape[-2:]
        for draw in range(150)
    ]
    heights, widths = zip(*shapes, strict=True)
    assert 20 <= min(heights) < 23
    assert max(heights) == 61  # the image has no more
    assert 20 <= min(widths) < 23
    assert 67 < max(widths) <= 70
    assert abs(np.corrcoef(heights, widths)[0, 1]) < 0.25
    assert apply([{'type': 'RandomCropSize', 'sides': (90, 99)}], segmentation_sample(), 0)[0].shape[-2:] == (61, 83)


def test_a_crop_may_have_no_objects():
    image, target = detection_sample(0, 200, 200, count=1)
    target['masks'][:] = 0
    target['masks'][0, :5, :5] = 1
    target['boxes'][:] = torch.tensor([0, 0, 5, 5])
    sizes = [
        len(apply([{'type': 'RandomCropSize', 'sides': (50, 60)}], (image, target), draw)[1]['boxes'])
        for draw in range(20)
    ]
    assert 0 in sizes


def test_crops_avoid_a_class_that_fills_them():
    classes = torch.zeros(20, 200, dtype=torch.uint8)
    classes[:, 150:] = 1
    classes[:, :5] = 255
    sample = tv_tensors.Image(classes.repeat(3, 1, 1)), {'mask': tv_tensors.Mask(classes)}

    def is_mixed(crop):
        shares = torch.bincount(crop[crop < 255].long(), minlength=2) / (crop < 255).sum()
        return shares.max() < 0.75 and len(crop[crop < 255].unique()) > 1

    shares = {}
    for ratio in (1.0, 0.75):
        steps = [{'type': 'RandomCropMax', 'size': 20, 'cat_max_ratio': ratio}]
        crops = [apply(steps, sample, draw)[1]['mask'].as_subclass(torch.Tensor) for draw in range(100)]
        shares[ratio] = np.mean([bool(is_mixed(crop)) for crop in crops])
    chance = 10 / 181  # of the places of a crop, those with 6 to 14 columns of each class, and one more by rounding
    assert shares[1.0] < 2.5 * chance
    assert shares[0.75] > 4 * chance


def test_pixels_that_do_not_count_have_no_share():
    """The first crop is taken, though nine tenths of it don't count."""
    classes = torch.full((50, 50), 255, dtype=torch.uint8)
    classes[::10] = torch.arange(50, dtype=torch.uint8) % 2
    sample = (
        tv_tensors.Image(torch.arange(2500).remainder(251).to(torch.uint8).view(1, 50, 50)),
        {'mask': tv_tensors.Mask(classes)},
    )
    for draw in range(10):
        first, own = (
            apply([{'type': 'RandomCropMax', 'size': 20, 'cat_max_ratio': ratio}], sample, draw)[0]
            for ratio in (1.0, 0.75)
        )
        assert torch.equal(first, own)


def test_eleven_crops_are_drawn_at_most():
    sample = tv_tensors.Image(torch.zeros(3, 50, 50, dtype=torch.uint8)), {'mask': tv_tensors.Mask(torch.zeros(50, 50))}
    cropped, target = RandomCropMax(20, cat_max_ratio=0.75)(*sample)
    assert cropped.shape[-2:] == target['mask'].shape == (20, 20)


def test_a_share_of_classes_needs_a_map_of_them():
    with pytest.raises(ValueError, match='needs a map of classes'):
        RandomCropMax(20, cat_max_ratio=0.75)(*detection_sample())


# Objects that are left out


def test_objects_of_no_size_or_without_mask_are_left_out_with_all_that_is_theirs():
    image, target = detection_sample()
    target['boxes'][1, 2] = target['boxes'][1, 0]
    target['boxes'][2] = torch.tensor([-5, 3, 0.5, 9])
    target['masks'][4] = 0
    target['crowd'] = torch.tensor([True, False, False, False, True])
    _, own = apply([{'type': 'FilterObjects'}], (image, target))
    assert own['labels'].tolist() == [10, 13]
    assert torch.equal(own['boxes'], target['boxes'][[0, 3]])
    assert torch.equal(own['masks'], target['masks'][[0, 3]])
    assert own['crowd'].tolist() == [True, False]
    assert isinstance(own['boxes'], tv_tensors.BoundingBoxes)
    assert isinstance(own['masks'], tv_tensors.Mask)
    assert len(target['labels']) == 5
    del target['masks']
    assert apply([{'type': 'FilterObjects'}], (image, target))[1]['labels'].tolist() == [10, 13, 14]
    with pytest.raises(ValueError, match='boxes_from_masks needs masks'):
        apply([{'type': 'FilterObjects', 'boxes_from_masks': True}], (image, target))


# Colours


def test_colours_change_as_in_hsv_and_nothing_else_does():
    image, target = detection_sample(0, 20, 30)
    distort = PhotometricDistortion()
    plain = {'brightness': None, 'contrast': None, 'saturation': None, 'hue': None, 'contrast_first': True}
    pixels = image.permute(1, 2, 0).numpy()

    def made(**params):
        return distort.transform(image, {**plain, **params}).permute(1, 2, 0).numpy().astype(int)

    assert np.array_equal(made(), pixels)
    assert np.array_equal(made(brightness=-20.5), np.clip(pixels - 20.5, 0, 255).astype(int))
    for first in (True, False):
        assert np.array_equal(
            made(contrast=1.4, contrast_first=first), np.clip(pixels * np.float32(1.4), 0, 255).astype(int)
        )
    for factor in (0.5, 1.5):
        hsv = rgb_to_hsv(pixels / 255)
        hsv[..., 1] = np.clip(hsv[..., 1] * factor, 0, 1)
        assert np.abs(made(saturation=factor) - 255 * hsv_to_rgb(hsv)).max() <= 1
    hsv = rgb_to_hsv(pixels / 255)
    hsv[..., 0] = (hsv[..., 0] + 0.08) % 1
    assert np.abs(made(hue=0.08) - 255 * hsv_to_rgb(hsv)).max() <= 1.01
    assert distort.transform(target['masks'], {**plain, 'brightness': 9.0}) is target['masks']
    grey = tv_tensors.Image(torch.full((3, 2, 2), 77, dtype=torch.uint8))
    assert torch.equal(distort.transform(grey, {**plain, 'saturation': 1.5}), grey)


def test_each_change_of_colours_is_made_half_of_the_time_within_its_range():
    seed_everything(0)
    drawn = [PhotometricDistortion().make_params([]) for _ in range(400)]
    ranges = {'brightness': (-32, 32), 'contrast': (0.5, 1.5), 'saturation': (0.5, 1.5), 'hue': (-0.1, 0.1)}
    for name, (low, high) in ranges.items():
        values = [params[name] for params in drawn if params[name] is not None]
        assert 150 < len(values) < 250
        assert low <= min(values) < low + 0.05 * (high - low)
        assert high >= max(values) > high - 0.05 * (high - low)
    assert 150 < sum(params['contrast_first'] for params in drawn) < 250


# Configs


def test_pipelines_are_chosen_between_by_configs():
    flip = {'type': 'RandomHorizontalFlip', 'p': 1.0}
    steps = [{'type': 'RandomChoice', 'transforms': [flip, [flip, {'type': 'RandomVerticalFlip', 'p': 1.0}]]}]
    image, target = segmentation_sample()
    found = [apply(steps, (image, target), draw)[0] for draw in range(30)]
    upright = [torch.equal(own, image.flip(-1)) for own in found]
    assert 5 < sum(upright) < 25
    assert all(torch.equal(own, image.flip(-1, -2)) for own, is_up in zip(found, upright, strict=True) if not is_up)


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        ({'type': 'ResizeKeepRatio', 'scale': (1333, 800, 3)}, r'scale .* got \(1333, 800, 3\)'),
        ({'type': 'ResizeKeepRatio', 'scale': (0, 800)}, r'scale .* got \(0, 800\)'),
        ({'type': 'RandomChoiceResize', 'scales': []}, r'scales .* got \[\]'),
        ({'type': 'RandomChoiceResize', 'scales': [(3, 4), 'a']}, "Each of scales .* got 'a'"),
        ({'type': 'RandomResizeRatio', 'scale': (9, 9), 'ratio': (2, 1)}, r'ratio .* got \(2, 1\)'),
        ({'type': 'RandomCropMax', 'size': -1}, 'size .* got -1'),
        ({'type': 'RandomCropMax', 'size': 9, 'cat_max_ratio': 75}, 'cat_max_ratio .* got 75'),
        ({'type': 'RandomCropSize', 'sides': (600, 384)}, r'sides .* got \(600, 384\)'),
        ({'type': 'PadTo', 'size': 1.5}, 'size .* got 1.5'),
        ({'type': 'FilterObjects', 'min_size': 0}, 'min_size .* got 0'),
        ({'type': 'PhotometricDistortion', 'hue': 18}, 'hue .* 18'),
        ({'type': 'PhotometricDistortion', 'contrast': (-0.5, 1)}, r'contrast .* got \(-0.5, 1\)'),
    ],
)
def test_wrong_arguments_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        TRANSFORMS.build(config)
