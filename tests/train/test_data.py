import shutil

import pytest
import torch

from zoo.train.data import LabelledImages, check_classes
from zoo.train.run import train
from zoo.train.samplers import ShuffledStream

CONFIG = 'quickstart/biformer_digits'
TO_TENSOR = {'type': 'PILToTensor'}


@pytest.fixture
def copy(colours, tmp_path):
    """A copy of the colours to spoil."""
    return shutil.copytree(colours, tmp_path / 'copy')


def test_images_and_classes_are_those_of_the_folders(colours):
    dataset = LabelledImages(colours, 'train', TO_TENSOR)
    assert len(dataset) == 60
    assert dataset.metainfo == {'classes': ['blue', 'green', 'red']}
    image, label = dataset[2 * 20 + 3]  # red's number 3
    assert label == 2
    assert image.dtype == torch.uint8
    assert image.shape == (3, 17, 19)
    assert image[:, 5, 7].tolist() == [246, 15, 15]


def test_timm_transforms_leave_normalization_to_the_task(colours):
    transform = {'type': 'timm_transform', 'input_size': 24, 'is_training': True, 'auto_augment': 'rand-m9-mstd0.5'}
    image, _ = LabelledImages(colours, 'train', transform)[0]
    assert image.dtype == torch.uint8
    assert image.shape == (3, 24, 24)


def test_a_draw_is_augmented_by_its_key_alone(colours):
    steps = [{'type': 'RandomAffine', 'degrees': 90, 'translate': (0.3, 0.3)}, TO_TENSOR]
    dataset = LabelledImages(colours, 'train', steps)
    first, other = (dataset[4, (7, 100)][0], dataset[4, (7, 101)][0])
    torch.rand(3)
    assert torch.equal(dataset[4, (7, 100)][0], first)
    assert not torch.equal(first, other)


def test_the_stream_is_permutations_from_any_position():
    sampler = ShuffledStream(range(11), seed=5)
    stream = iter(sampler)
    draws = [next(stream) for _ in range(33)]
    epochs = [[index for index, _ in draws[i : i + 11]] for i in (0, 11, 22)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [key for _, key in draws] == [(5, draw) for draw in range(33)]
    sampler.start = 17
    assert next(iter(sampler)) == draws[17]


def test_processes_share_the_stream():
    whole = iter(ShuffledStream(range(11), seed=5))
    expected = [next(whole) for _ in range(30)]
    for rank in range(3):
        sampler = ShuffledStream(range(11), seed=5)
        sampler.rank, sampler.world_size, sampler.start = rank, 3, 2
        assert len(sampler) == 3
        stream = iter(sampler)
        assert [next(stream) for _ in range(8)] == expected[6 + rank :: 3]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f'{tmp_path}/train'):
        LabelledImages(tmp_path, 'train', TO_TENSOR)


def test_an_empty_class_is_named(copy):
    (copy / 'train' / 'violet' / 'dark').mkdir(parents=True)
    with pytest.raises(ValueError, match=r'without images.*violet'):
        LabelledImages(copy, 'train', TO_TENSOR)


def test_images_outside_of_classes_are_refused(copy):
    shutil.copy(copy / 'train' / 'red' / '0.png', copy / 'train')
    with pytest.raises(ValueError, match='outside of class folders'):
        LabelledImages(copy, 'train', TO_TENSOR)


def test_a_reader_that_only_streams_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'wds/images' only streams"):
        LabelledImages(tmp_path, 'train', TO_TENSOR, reader='wds/images')


@pytest.mark.parametrize('content', [b'', b'not an image', None], ids=['empty', 'text', 'cut short'])
def test_an_unreadable_image_stops_the_run_and_is_named(copy, tiny, tmp_path, content):
    path = copy / 'train' / 'green' / '7.png'
    path.write_bytes(path.read_bytes()[:60] if content is None else content)
    options = dict(tiny)
    options['train_dataloader.dataset'] = {**options['train_dataloader.dataset'], 'root': str(copy)}
    with pytest.raises(OSError, match=f'Cannot read the image {path}'):
        train(CONFIG, tmp_path / 'run', cfg_options=options)


def test_classes_must_be_the_same_in_both_parts_and_in_the_model(colours, copy):
    train_part = LabelledImages(colours, 'train', TO_TENSOR)
    check_classes(train_part, LabelledImages(colours, 'test', TO_TENSOR), num_classes=3)
    with pytest.raises(ValueError, match=r'3 classes.*num_classes=10'):
        check_classes(train_part, LabelledImages(colours, 'test', TO_TENSOR), num_classes=10)
    (copy / 'test' / 'red').rename(copy / 'test' / 'rot')
    with pytest.raises(ValueError, match='only one of training and test data: red, rot'):
        check_classes(train_part, LabelledImages(copy, 'test', TO_TENSOR), num_classes=3)
