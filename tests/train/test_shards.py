import io
import json
import os
import tarfile
from collections import Counter

import pytest
import torch
from killing import launch, run, same
from PIL import Image
from torch.utils.data import DataLoader

from zoo.train import checkpoints, shards
from zoo.train.data import LabelledImages
from zoo.train.samplers import ShuffledStream
from zoo.train.shards import ShardReader, expand_braces, index_shard

LENGTHS = (7, 1, 12, 4)  # uneven, 24 in all
TO_TENSOR = {'type': 'PILToTensor'}


def picture(number):
    file = io.BytesIO()
    Image.new('RGB', (9, 8), (number, 255 - number, 7)).save(file, 'png')
    return file.getvalue()


def add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_shard(path, numbers, label='cls'):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w') as archive:
        for number in numbers:
            add(archive, f'./part.one/{number:04}.PNG', picture(number))
            if label == 'cls':
                add(archive, f'./part.one/{number:04}.cls', str(number % 3).encode())
            else:
                add(archive, f'./part.one/{number:04}.json', json.dumps({label: number % 3, 'name': 'x'}).encode())


def write_split(root, split, lengths=LENGTHS, label='cls'):
    first = 0
    names = [f'{split}-{shard:03}.tar' for shard in range(len(lengths))]
    for name, length in zip(names, lengths, strict=True):
        write_shard(root / name, range(first, first + length), label)
        first += length
    return {'name': split, 'filenames': names, 'shard_lengths': list(lengths), 'num_samples': sum(lengths)}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / 'data'
    splits = {'train': write_split(folder, 'train'), 'test': write_split(folder, 'test', (3, 2), 'label')}
    (folder / '_info.json').write_text(json.dumps({'splits': splits}))
    return folder


def number_of(image):
    return int(image[0, 0, 0])


@pytest.mark.parametrize('split', ['train', 'train-{000..003}.tar', 'train-{000..001}.tar::train-00{2,3}.tar|24'])
def test_samples_are_read_by_position_in_the_order_of_the_shards(root, split):
    dataset = LabelledImages(root, split, TO_TENSOR, reader='wds/')
    assert [number_of(image) for image, _ in dataset] == list(range(24))
    assert [label for _, label in dataset] == [number % 3 for number in range(24)]
    assert dataset.filename(8) == f'{root}/train-002.tar/./part.one/0008.PNG'


def test_labels_may_be_in_json_and_a_folder_may_be_a_split(root, tmp_path):
    assert ShardReader(root, 'test').labels.tolist() == [0, 1, 2, 0, 1]
    write_split(tmp_path / 'plain' / 'val', 'any', (2, 5), 'cls')
    assert ShardReader(tmp_path / 'plain', 'val').labels.tolist() == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize('workers', [0, 1, 2])
def test_uneven_shards_over_processes_and_workers_lose_and_double_no_sample(root, workers):
    dataset = LabelledImages(root, 'train', TO_TENSOR, reader='wds/')
    seen = Counter()
    for rank in range(2):
        sampler = ShuffledStream(dataset, seed=3)
        sampler.rank, sampler.world_size = rank, 2
        batches = iter(DataLoader(dataset, batch_size=4, sampler=sampler, num_workers=workers))
        for _ in range(2 * 24 // 2 // 4):  # two epochs
            seen.update(number_of(image) for image in next(batches)[0])
    assert seen == dict.fromkeys(range(24), 2)


@pytest.mark.slow
def test_a_killed_run_on_shards_resumes_to_the_same_bits(root, tiny, tmp_path):
    def data(split):
        steps = [{'type': 'RandomHorizontalFlip'}] if split == 'train' else []
        transform = [{'type': 'Resize', 'size': (33, 31)}, *steps, TO_TENSOR]
        dataset = {'type': 'LabelledImages', 'root': str(root), 'split': split, 'reader': 'wds/'}
        return {**dataset, 'transform': transform, '_delete_': True}

    options = {
        **tiny,
        'train_dataloader.dataset': data('train'),
        'val_dataloader.dataset': data('test'),
        'train_dataloader.batch_size': 4,
        'train_dataloader.num_workers': 2,
        'default_hooks.checkpoint.interval_iters': 5,
    }
    killer = {'type': 'Killer', 'moment': 'step', 'number': 8}
    killed = {**options, 'custom_hooks': [killer], 'custom_imports': {'imports': ['killing'], '_delete_': True}}
    assert launch(run, tmp_path / 'whole', options) == [0]
    assert launch(run, tmp_path / 'parts', killed) == [-9]
    assert launch(run, tmp_path / 'parts', options, True) == [0]
    whole, parts = (checkpoints.load(tmp_path / name / 'iter_12.pth') for name in ('whole', 'parts'))
    assert same(whole['state_dict'], parts['state_dict'])
    assert same(whole['optimizer'], parts['optimizer'])


def test_the_index_is_made_once_and_again_when_a_shard_changes(root, monkeypatch):
    indexed = []
    monkeypatch.setattr(shards, 'index_shard', lambda path: indexed.append(path.name) or index_shard(path))
    ShardReader(root, 'test')
    ShardReader(root, 'test')
    assert indexed == ['test-000.tar', 'test-001.tar']
    os.utime(root / 'test-001.tar', ns=(1, 1))
    ShardReader(root, 'test')
    assert indexed == ['test-000.tar', 'test-001.tar'] * 2


@pytest.mark.parametrize(
    ('harm', 'message'),
    [
        (lambda content: content[:-12_000], 'test-001.tar is (not a whole tar file|cut off)'),
        (lambda content: content[: content.rindex(b'name') // 512 * 512 + 512], 'test-001.tar is cut off'),
        (lambda content: b'', 'test-001.tar is not a whole tar file'),
        (lambda content: content[:512] + b'x' * 512 + content[1024:1536] + b'y' * 5000, 'test-001.tar'),
    ],
    ids=['within an image', 'before its end', 'empty', 'overwritten'],
)
def test_a_broken_shard_is_named(root, harm, message):
    path = root / 'test-001.tar'
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        ShardReader(root, 'test')


def test_a_shard_with_fewer_samples_than_it_should_have_is_named(root):
    write_shard(root / 'train-002.tar', range(5))
    with pytest.raises(ValueError, match=r'train-002\.tar has 5 samples, but its _info\.json says 12'):
        ShardReader(root, 'train')


@pytest.mark.parametrize(
    ('members', 'message'),
    [
        ({'a.png': picture(1)}, 'Sample a of .* has no label'),
        ({'a.cls': b'1'}, 'has a label, but no image'),
        ({'a.png': picture(1), 'a.cls': b'cat'}, "a.cls holds no class index: b'cat'"),
        ({'a.png': picture(1), 'a.json': b'{"label": -1}'}, 'a.json holds no class index, but -1'),
        ({'a.png': picture(1), 'a.jpg': picture(1), 'a.cls': b'1'}, 'two images of sample a'),
        ({'a.txt': b'words'}, 'There are no samples'),
    ],
)
def test_a_sample_without_image_or_label_is_named(tmp_path, members, message):
    with tarfile.open(tmp_path / 'one.tar', 'w') as archive:
        for name, content in members.items():
            add(archive, name, content)
    with pytest.raises(ValueError, match=message):
        ShardReader(tmp_path, 'one.tar')


def test_other_members_and_dotted_names_are_told_apart(tmp_path):
    with tarfile.open(tmp_path / 'one.tar', 'w') as archive:
        for name in ('a', 'b'):
            add(archive, f'{name}.cls', b' 2\n')
            add(archive, f'{name}.mask.png', b'not looked at')
            add(archive, f'{name}.jpg', picture(1))
            add(archive, f'{name}.json', b'{"caption": "no label here"}')
        add(archive, '.hidden.png', b'')
    assert ShardReader(tmp_path, 'one.tar').labels.tolist() == [2, 2]


@pytest.mark.parametrize(
    ('split', 'error', 'message'),
    [
        ('https://host/train-{00..12}.tar', ValueError, 'is not on this machine'),
        ('pipe:cat x.tar', ValueError, 'is not on this machine'),
        ('valid', FileNotFoundError, r'no split and no subfolder .valid.\. Its _info\.json has train, test'),
        ('train-{000..004}.tar', FileNotFoundError, r'There are no shards .*train-004\.tar'),
        ('train-000.tar::train-000.tar', ValueError, 'named twice'),
    ],
)
def test_what_there_is_not_is_said(root, split, error, message):
    with pytest.raises(error, match=message):
        ShardReader(root, split)


def test_a_compressed_shard_is_refused(tmp_path):
    with tarfile.open(tmp_path / 'one.tar.gz', 'w:gz') as archive:
        add(archive, 'a.cls', b'1')
    with pytest.raises(ValueError, match='is compressed'):
        ShardReader(tmp_path, 'one.tar.gz')


@pytest.mark.parametrize(
    ('pattern', 'names'),
    [
        ('a.tar', ['a.tar']),
        ('a-{08..10}.tar', ['a-08.tar', 'a-09.tar', 'a-10.tar']),
        ('{a,b}{9..10}', ['a9', 'a10', 'b9', 'b10']),
        ('{0000..0001}', ['0000', '0001']),
    ],
)
def test_braces_expand(pattern, names):
    assert expand_braces(pattern) == names


def test_braces_that_say_nothing_are_refused():
    with pytest.raises(ValueError, match='neither a range'):
        expand_braces('a-{0-10}.tar')


def test_images_are_as_timms_stream_gives_them(root):
    webdataset = pytest.importorskip('webdataset')
    del webdataset
    from timm.data.readers import create_reader

    stream = create_reader('wds/', root=str(root), split='train', is_training=False, batch_size=1)
    expected = [(torch.tensor(image.getpixel((0, 0)))[0].item(), label) for image, label in stream]
    dataset = LabelledImages(root, 'train', TO_TENSOR, reader='wds/')
    assert [(number_of(image), label) for image, label in dataset] == expected
