import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.train import checkpoints
from zoo.train.data import LEFT_OUT, LabelledImages, check_classes
from zoo.train.images import ImageError, ImageFile
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
    with pytest.raises(ValueError, match="'hfids/images' only streams"):
        LabelledImages(tmp_path, 'train', TO_TENSOR, reader='hfids/images')


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


# Images of odd kinds


def read(path, mode='RGB'):
    return np.asarray(ImageFile(str(path)).read(mode))


def test_cmyk_transparent_and_moving_images_are_read_as_pillow_converts_them(tmp_path):
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 255, (9, 7, 3), dtype='uint8')
    image = Image.fromarray(pixels)
    image.convert('CMYK').save(tmp_path / 'cmyk.tif')
    assert np.array_equal(read(tmp_path / 'cmyk.tif'), np.asarray(image.convert('CMYK').convert('RGB')))
    palette = image.quantize(4)
    palette.save(tmp_path / 'palette.png', transparency=1)
    assert np.array_equal(read(tmp_path / 'palette.png'), np.asarray(palette.convert('RGB')))
    palette.save(tmp_path / 'moving.gif', save_all=True, append_images=[palette.rotate(180)])
    assert np.array_equal(read(tmp_path / 'moving.gif'), np.asarray(palette.convert('RGB')))


def test_an_exif_orientation_is_left_alone_as_timm_does(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new('RGB', (11, 5)).save(tmp_path / 'turned.jpg', exif=exif)
    assert read(tmp_path / 'turned.jpg').shape == (5, 11, 3)


@pytest.mark.parametrize('extension', ['png', 'tif'])
def test_sixteen_bit_grey_keeps_its_tones(tmp_path, extension):
    values = (np.arange(63).reshape(9, 7) * 1040).astype('uint16')
    Image.fromarray(values).save(tmp_path / f'grey.{extension}')
    grey = read(tmp_path / f'grey.{extension}')
    assert np.array_equal(grey, np.repeat((values // 256).astype('uint8')[..., None], 3, axis=2))


def test_pixels_without_a_known_range_are_refused(tmp_path):
    Image.fromarray(np.ones((3, 4), 'float32')).save(tmp_path / 'float.tif')
    with pytest.raises(ImageError, match=r'float.tif: its pixels \(mode F\) have 32 bits and so no known range'):
        read(tmp_path / 'float.tif')


def test_a_decompression_bomb_is_called_one(tmp_path, monkeypatch):
    Image.new('RGB', (50, 50)).save(tmp_path / 'large.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    with pytest.raises(ImageError, match=r'large.png: .*2500 pixels.*decompression bomb'):
        read(tmp_path / 'large.png')


@pytest.mark.parametrize('extension', ['jpg', 'png', 'gif', 'webp', 'bmp'])
def test_images_cut_short_anywhere_are_named(tmp_path, extension):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype='uint8')
    Image.fromarray(pixels).save(tmp_path / f'whole.{extension}')
    content = (tmp_path / f'whole.{extension}').read_bytes()
    for share in (0, 0.01, 0.2, 0.5, 0.9):
        (tmp_path / f'cut.{extension}').write_bytes(content[: int(share * len(content))])
        with pytest.raises(ImageError, match=f'Cannot read the image {tmp_path}/cut.{extension}: '):
            read(tmp_path / f'cut.{extension}')


def test_images_of_types_that_timm_leaves_out_are_not_lost(copy):
    Image.new('RGB', (9, 9)).save(copy / 'train' / 'red' / 'another.webp')
    assert len(LabelledImages(copy, 'train', TO_TENSOR)) == 61


def test_tar_files_have_their_classes_and_are_read_by_forked_workers_too(colours, tmp_path):
    with tarfile.open(tmp_path / 'train.tar', 'w') as tar:
        tar.add(colours / 'train', '.')
    dataset = LabelledImages(tmp_path / 'train.tar', '', TO_TENSOR)
    assert dataset.metainfo == {'classes': ['blue', 'green', 'red']}
    expected = LabelledImages(colours, 'train', TO_TENSOR)
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2)
    dataset[0]  # which opens the file in this process
    for (image, label), (own, own_label) in zip(expected, loader, strict=True):
        assert torch.equal(image, own)
        assert label == own_label


# Images that can't be read, skipped


@pytest.fixture
def spoilt(copy):
    """The copy, with three broken images to train on and one to test on."""
    for number, content in ((3, b''), (4, b'text'), (9, None)):
        path = copy / 'train' / 'green' / f'{number}.png'
        path.write_bytes(path.read_bytes()[:60] if content is None else content)
    (copy / 'test' / 'red' / '2.png').write_bytes(b'text')
    return copy


def test_a_skipped_image_is_replaced_by_one_that_the_draws_key_gives(spoilt):
    dataset = LabelledImages(spoilt, 'train', TO_TENSOR, on_error='skip')
    with pytest.warns(UserWarning, match=r'green/4\.png.*skipped'):
        first = [dataset[24, (0, draw)] for draw in range(30)]
    again = [dataset[24, (0, draw)] for draw in reversed(range(30))][::-1]
    assert all(torch.equal(a, b) and i == j for (a, i), (b, j) in zip(first, again, strict=True))
    assert {label for _, label in first} == {0, 1, 2}  # any image of the data
    blank, label = dataset[24]
    assert label == LEFT_OUT
    assert not blank.any()


def test_a_file_that_can_not_be_opened_is_no_broken_image(copy):
    dataset = LabelledImages(copy, 'train', TO_TENSOR, on_error='skip')
    (copy / 'train' / 'green' / '4.png').unlink()
    with pytest.raises(FileNotFoundError, match=r'green/4\.png'):
        dataset[24, (0, 0)]


def test_data_of_broken_images_alone_ends_the_run(copy):
    dataset = LabelledImages(copy, 'test', TO_TENSOR, on_error='skip')
    for path in (copy / 'test').rglob('*.png'):
        path.write_bytes(b'')
    with pytest.warns(UserWarning, match='empty'), pytest.raises(OSError, match='100 images'):
        dataset[0, (0, 0)]


def test_another_way_to_meet_errors_is_refused(colours):
    with pytest.raises(ValueError, match="'raise' or 'skip', got 'ignore'"):
        LabelledImages(colours, 'train', TO_TENSOR, on_error='ignore')


def test_a_run_that_skips_lists_what_workers_could_not_read_and_leaves_it_out(spoilt, tiny, tmp_path, capfd):
    options = {
        **tiny,
        'train_cfg.max_epochs': 1,
        'train_dataloader.num_workers': 2,
        'custom_hooks': [{'type': 'BrokenImages'}],
    }
    for part in ('train', 'val'):
        dataset = options[f'{part}_dataloader.dataset']
        options[f'{part}_dataloader.dataset'] = {**dataset, 'root': str(spoilt), 'on_error': 'skip'}
    result = train(CONFIG, tmp_path / 'run', cfg_options=options)
    lines = (tmp_path / 'run' / 'broken_images.txt').read_text().splitlines()
    assert [line.split('\t')[0] for line in lines] == [
        str(spoilt / name) for name in ('test/red/2.png', 'train/green/3.png', 'train/green/4.png', 'train/green/9.png')
    ]
    assert lines[1].endswith('\tthe file is empty')
    assert 'Images that can not be read, and were skipped: 4' in capfd.readouterr().out
    assert round(14 * result.metrics['top1'] / 100, 9).is_integer()  # of 15 images
    assert not list((tmp_path / 'run').glob('broken_images/*'))
    again = train(
        CONFIG, tmp_path / 'again', cfg_options={**options, 'train_dataloader.num_workers': 0}, preflight=False
    )
    ours, others = (checkpoints.load(each.checkpoint)['state_dict'] for each in (result, again))
    assert all(torch.equal(value, others[key]) for key, value in ours.items())
