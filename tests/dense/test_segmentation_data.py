import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from zoo.train.dense.annotations import AnnotationError
from zoo.train.dense.segmentation_data import ADE20K, Cityscapes, SegmentationFolder
from zoo.train.images import ImageError
from zoo.train.registry import DATASETS

SIZE = (13, 19)  # height and width


def save(path, pixels, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(pixels))
    if mode == 'P':
        image.putpalette(list(range(256)) * 3)
    image.save(path)


def stored(seed, high, low=0):
    return np.random.default_rng(seed).integers(low, high, SIZE, dtype=np.uint8)


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Four images and masks of three classes and 255, one of them further below."""
    for i, name in enumerate(('a', 'b', 'c', 'deep/d')):
        save(tmp_path / 'images' / f'{name}.png', picture(i))
        mask = stored(i, 3)
        mask[:2, :3] = 255
        save(tmp_path / 'masks' / f'{name}.png', mask, 'P' if i == 1 else None)
    return tmp_path


def read(root, classes=('sky', 'sea', 'land'), **kwargs):
    return SegmentationFolder(root / 'images', root / 'masks', classes, **kwargs)


def test_samples_are_those_of_the_contract(folder):
    dataset = read(folder)
    assert len(dataset) == 4
    assert dataset.metainfo == {'classes': ['sky', 'sea', 'land']}
    for i, (image, target) in enumerate(dataset):
        assert type(image) is torch.Tensor
        assert image.dtype == torch.uint8
        assert np.array_equal(image.permute(1, 2, 0).numpy(), picture(i))
        assert set(target) == {'name', 'mask'}
        assert isinstance(target['mask'], tv_tensors.Mask)
        expected = stored(i, 3)
        expected[:2, :3] = 255
        assert np.array_equal(target['mask'].numpy(), expected)
    assert [target['name'] for _, target in dataset] == ['a.png', 'b.png', 'c.png', 'deep/d.png']


def test_a_draw_is_transformed_by_its_key_alone(folder):
    steps = [{'type': 'RandomCropMax', 'size': 8, 'cat_max_ratio': 0.75}, {'type': 'PhotometricDistortion'}]
    config = {
        'type': 'SegmentationFolder',
        'images': str(folder / 'images'),
        'masks': str(folder / 'masks'),
        'classes': ['sky', 'sea', 'land'],
        'transform': steps,
    }
    dataset = DATASETS.build(config)
    first, again, other = (dataset[1, (7, draw)] for draw in (3, 3, 4))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1]['mask'], again[1]['mask'])
    assert not torch.equal(first[0], other[0])


def test_zero_may_stand_for_what_does_not_count(folder):
    classes = read(folder, ('sea', 'land'), reduce_zero_label=True)[2][1]['mask'].numpy()
    raw = stored(2, 3)
    expected = np.choose(raw, [255, 0, 1])
    expected[:2, :3] = 255
    assert np.array_equal(classes, expected)


def test_values_may_be_mapped(folder):
    mapped = read(folder, ('a', 'b'), class_map={0: 1, 1: 255, 2: 0})
    raw = stored(2, 3)
    expected = np.choose(raw, [1, 255, 0])
    expected[:2, :3] = 255
    assert np.array_equal(mapped[2][1]['mask'].numpy(), expected)
    ignored = read(folder, class_map={0: 0, 1: 1, 2: 2, 255: 1}, ignore_index=2)
    expected = np.where(raw == 2, 255, raw)
    expected[:2, :3] = 1
    assert np.array_equal(ignored[2][1]['mask'].numpy(), expected)


def test_masks_in_colours_are_read_by_a_palette(tmp_path):
    palette = [(128, 0, 0), (0, 0, 128), (0, 255, 7)]
    raw = stored(1, 3)
    save(tmp_path / 'images' / 'a.png', picture(0))
    save(tmp_path / 'masks' / 'a.png', np.array(palette, np.uint8)[raw])
    assert np.array_equal(read(tmp_path, palette=palette)[0][1]['mask'].numpy(), raw)
    reduced = read(tmp_path, ('a', 'b'), palette=palette, reduce_zero_label=True)
    assert np.array_equal(reduced[0][1]['mask'].numpy(), np.choose(raw, [255, 0, 1]))
    with pytest.raises(AnnotationError, match=r'class out of range, 1: .*a\.png .*colours that are not in the palette'):
        read(tmp_path, ('a', 'b'), palette=palette[1:])
    with pytest.raises(AnnotationError, match=r'broken mask, 1: .*colours or fractions: give the palette'):
        read(tmp_path)


def test_masks_may_have_sixteen_bits(tmp_path):
    raw = stored(1, 3).astype(np.uint16) * 1000
    save(tmp_path / 'images' / 'a.jpg', picture(0))
    save(tmp_path / 'masks' / 'a.png', raw)
    dataset = read(tmp_path, class_map={0: 0, 1000: 1, 2000: 2})
    assert np.array_equal(dataset[0][1]['mask'].numpy(), raw // 1000)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'classes': ()}, 'got 0'),
        ({'classes': ['a'] * 256}, '1 to 255 classes, got 256'),
        ({'class_map': {0: 3}}, 'got 0: 3'),
        ({'class_map': {-1: 0}}, 'got -1: 0'),
        ({'class_map': {0: 0}, 'reduce_zero_label': True}, 'leave reduce_zero_label out'),
        ({'ignore_index': -1}, 'ignore_index .* got -1'),
        ({'palette': [(1, 2)]}, 'three integers'),
        ({'palette': [(1, 2, 256)]}, '0 to 255'),
        ({'palette': [(1, 2, 3), (1, 2, 3)]}, 'twice'),
        ({'on_error': 'ignore'}, "got 'ignore'"),
        ({'image_suffix': '.jpg'}, 'holds no images'),
    ],
)
def test_arguments_that_make_no_sense_are_refused(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        read(folder, **arguments)


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'no folder .*images'):
        read(tmp_path)


def test_two_images_of_one_name_are_refused(folder):
    save(folder / 'images' / 'a.jpg', picture(0))
    with pytest.raises(ValueError, match=r'both a\.jpg and a\.png'):
        read(folder)
    assert len(read(folder, image_suffix='.png')) == 4


# Broken annotations


def drop_mask(root):
    (root / 'masks' / 'b.png').unlink()


def drop_image(root):
    (root / 'images' / 'b.png').unlink()


def resize(root):
    save(root / 'masks' / 'b.png', np.zeros((19, 13), np.uint8))


def number(root):
    pixels = stored(1, 3)
    pixels[0, :5] = 9
    save(root / 'masks' / 'b.png', pixels)


def cut(root):
    path = root / 'masks' / 'b.png'
    path.write_bytes(path.read_bytes()[:70])


BROKEN = {  # kind: change, file that is named, reason
    'image without mask': (drop_mask, 'images/b.png', r'no b\.png in .*masks'),
    'mask without image': (drop_image, 'masks/b.png', r'no b\.\* in .*images'),
    'mask of another size than its image': (resize, 'masks/b.png', '19 x 13, image 13 x 19'),
    'class out of range': (number, 'masks/b.png', 'values 9 in 5 pixels'),
    'broken mask': (cut, 'masks/b.png', '.'),
}


@pytest.mark.parametrize('kind', BROKEN)
def test_each_broken_annotation_is_named_and_refused(folder, kind):
    change, name, reason = BROKEN[kind]
    change(folder)
    with pytest.raises(AnnotationError, match=rf'\(1\):\n- {kind}, 1: {folder}/{name} \(.*{reason}') as caught:
        read(folder)
    assert [finding.kind for finding in caught.value.findings] == [kind]


@pytest.mark.parametrize('kind', BROKEN)
def test_each_broken_annotation_is_skipped_if_asked_for(folder, kind, caplog):
    BROKEN[kind][0](folder)
    dataset = read(folder, on_error='skip')
    assert [target['name'] for _, target in dataset] == ['a.png', 'c.png', 'deep/d.png']
    assert len(caplog.records) == 1
    assert f'- {kind}, 1:' in caplog.text


@pytest.mark.parametrize('kind', ['mask of another size than its image', 'class out of range', 'broken mask'])
def test_what_was_not_checked_is_found_when_it_is_used(folder, kind):
    BROKEN[kind][0](folder)
    dataset = read(folder, check=False)
    with pytest.raises(ImageError, match=r'masks/b\.png'):
        dataset[1]
    skipping = read(folder, check=False, on_error='skip')
    with pytest.warns(UserWarning, match='skipped'):
        names = {skipping[1, (0, draw)][1]['name'] for draw in range(20)}
    assert names == {'a.png', 'c.png', 'deep/d.png'}
    with pytest.warns(UserWarning, match='skipped'):
        image, target = skipping[1]
    assert not image.any()
    assert target['name'] == 'b.png'
    assert (target['mask'] == 255).all()


def test_a_broken_image_is_no_broken_annotation(folder):
    path = folder / 'images' / 'c.png'
    path.write_bytes(path.read_bytes()[:20])
    dataset = read(folder)
    with pytest.raises(ImageError, match=str(path)):
        dataset[2]


def test_nothing_left_is_an_error(folder):
    for path in (folder / 'masks').rglob('*.png'):
        path.unlink()
    with pytest.raises(AnnotationError, match=r'image without mask, 4: .*; and 1 more'):
        read(folder)
    with pytest.raises(ValueError, match='no images with a map of classes'):
        read(folder, on_error='skip')


# The known sets


@pytest.fixture
def ade(tmp_path):
    for split, numbers in (('training', (1, 2, 3)), ('validation', (1,))):
        for number in numbers:
            name = f'ADE_{"train" if split == "training" else "val"}_{number:08}'
            save(tmp_path / 'images' / split / f'{name}.jpg', picture(number))
            save(tmp_path / 'annotations' / split / f'{name}.png', stored(number, 151))
    return tmp_path


def test_ade20k_has_150_classes_and_its_zero_does_not_count(ade):
    dataset = ADE20K(ade)
    assert len(dataset) == 3
    classes = dataset.metainfo['classes']
    assert len(set(classes)) == 150
    assert (classes[0], classes[12], classes[85], classes[149]) == ('wall', 'person', 'chandelier', 'flag')
    raw = stored(2, 151).astype(int)
    assert (raw == 0).any()
    assert np.array_equal(dataset[1][1]['mask'].numpy(), np.where(raw == 0, 255, raw - 1))
    assert [target['name'] for _, target in ADE20K(ade, 'validation')] == ['ADE_val_00000001.jpg']
    with pytest.raises(ValueError, match="split must be 'training' or 'validation', got 'val'"):
        ADE20K(ade, 'val')
    save(ade / 'annotations' / 'training' / 'ADE_train_00000002.png', np.full(SIZE, 151, np.uint8))
    with pytest.raises(AnnotationError, match='values 151 in 247 pixels'):
        ADE20K(ade)


@pytest.fixture
def cities(tmp_path):
    """Two cities, with the other files that lie beside the masks."""
    for i, name in enumerate(('aachen/aachen_000000_000019', 'ulm/ulm_000001_000019', 'ulm/ulm_000002_000019')):
        save(tmp_path / 'leftImg8bit' / 'train' / f'{name}_leftImg8bit.png', picture(i))
        masks = tmp_path / 'gtFine' / 'train'
        save(masks / f'{name}_gtFine_labelIds.png', stored(i, 34))
        save(masks / f'{name}_gtFine_instanceIds.png', stored(i, 34).astype(np.uint16) * 1000)
        save(masks / f'{name}_gtFine_color.png', picture(i))
        (masks / f'{name}_gtFine_polygons.json').write_text('{}')
    return tmp_path


def test_cityscapes_has_19_classes_of_its_34(cities):
    dataset = Cityscapes(cities)
    assert [target['name'] for _, target in dataset] == [
        'aachen/aachen_000000_000019_leftImg8bit.png',
        'ulm/ulm_000001_000019_leftImg8bit.png',
        'ulm/ulm_000002_000019_leftImg8bit.png',
    ]
    names = dict(zip((7, 8, 11, 12, 13, 17, 19, 20, 21, 22), dataset.metainfo['classes'], strict=False))
    assert names == {
        7: 'road',
        8: 'sidewalk',
        11: 'building',
        12: 'wall',
        13: 'fence',
        17: 'pole',
        19: 'traffic light',
        20: 'traffic sign',
        21: 'vegetation',
        22: 'terrain',
    }
    raw, classes = stored(1, 34), dataset[1][1]['mask'].numpy()
    for value, index in ((7, 0), (8, 1), (20, 7), (26, 13), (28, 15), (31, 16), (33, 18)):
        assert (raw == value).any()
        assert (classes[raw == value] == index).all()
    for value in (0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30):
        assert (classes[raw == value] == 255).all()


def test_cityscapes_own_training_masks_are_read_too(cities):
    ids = Cityscapes(cities)
    for i, (_, target) in enumerate(ids):
        name = target['name'].replace('_leftImg8bit.png', '_gtFine_labelTrainIds.png')
        save(cities / 'gtFine' / 'train' / name, target['mask'].numpy())
        assert i < 3
    trained = Cityscapes(cities, labels='labelTrainIds')
    for (_, one), (_, other) in zip(ids, trained, strict=True):
        assert torch.equal(one['mask'], other['mask'])


def test_other_parts_of_cityscapes_are_refused(cities):
    with pytest.raises(ValueError, match="split must be 'train' or 'val', got 'test'"):
        Cityscapes(cities, 'test')
    with pytest.raises(ValueError, match="got 'color'"):
        Cityscapes(cities, labels='color')
    with pytest.raises(FileNotFoundError, match='leftImg8bit/val'):
        Cityscapes(cities, 'val')
    (cities / 'gtFine' / 'train' / 'ulm' / 'ulm_000001_000019_gtFine_labelIds.png').unlink()
    with pytest.raises(AnnotationError, match=r'image without mask, 1: .*ulm_000001_000019_leftImg8bit\.png'):
        Cityscapes(cities)
