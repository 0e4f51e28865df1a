"""Evaluation, prediction and features, held against a model and images taken by hand."""

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.numpy import load_file
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from torch import multiprocessing

import zoo
from zoo.train.class_names import match_classes, model_classes, read_class_map
from zoo.train.evaluation import evaluate, read_real_labels
from zoo.train.features import extract_features
from zoo.train.images import ImageError, ImageFile, find_images
from zoo.train.inference import load_model, predict
from zoo.train.run import train

NAME = 'test_resnet'
BROKEN = 'cut short.jpg'


def blocks(generator):
    """A picture of 27 x 32 pixels."""
    return np.kron(generator.integers(0, 255, (3, 4, 3)), np.ones((9, 8, 1))).astype('uint8')


def saved(path, num_classes):
    """A checkpoint whose predictions differ from image to image: its classifier is drawn to the pictures' features."""
    torch.manual_seed(1)
    model = timm.create_model(NAME, num_classes=num_classes).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    generator = np.random.default_rng(2)
    pictures = torch.stack([transform(Image.fromarray(blocks(generator))) for _ in range(16)])
    with torch.no_grad():
        features = model.forward_head(model.forward_features(pictures), pre_logits=True)
        model.fc.weight.copy_(torch.randn(num_classes, 96) / features.std(dim=0).clamp(min=1e-3) / 10)
        model.fc.bias.copy_(-model.fc.weight @ features.mean(dim=0))
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    return saved(tmp_path_factory.mktemp('weights') / 'three.pth', 3)


@pytest.fixture(scope='module')
def weights_1k(tmp_path_factory):
    return saved(tmp_path_factory.mktemp('weights') / 'imagenet.pth', 1000)


def picture(path, generator):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(blocks(generator)).save(path)
    return path


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """An image folder: 3 classes of 5, 7 and 9 images, and one that is cut short in the second."""
    root = tmp_path_factory.mktemp('images')
    generator = np.random.default_rng(0)
    for count, name in ((5, 'a'), (7, 'b'), (9, 'c')):
        for number in range(count):
            path = picture(root / name / f'{number}.jpg', generator)
    (root / 'b' / BROKEN).write_bytes(path.read_bytes()[:-100])
    return root


def logits_by_hand(weights, paths, num_classes=3):
    """As timm's examples have it: normalized by the transform, one image at a time."""
    model = timm.create_model(NAME, num_classes=num_classes, checkpoint_path=str(weights)).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with torch.no_grad():
        return torch.cat([model(transform(Image.open(path).convert('RGB'))[None]) for path in paths])


def whole(root):
    return sorted(path for path in root.rglob('*.jpg') if path.name != BROKEN)


def rows(path):
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def test_accuracies_are_those_counted_by_hand_without_the_broken_image(images, weights, tmp_path):
    result = evaluate(NAME, images, checkpoint=weights, on_error='skip', batch_size=4, out=tmp_path / 'out')
    paths = whole(images)
    labels = ['abc'.index(path.parent.name) for path in paths]
    predictions = logits_by_hand(weights, paths).argmax(dim=1).tolist()
    assert len(set(predictions)) == 3
    right = [label == prediction for label, prediction in zip(labels, predictions, strict=True)]
    assert 0 < sum(right) < 21
    assert result.metrics == {'top1': pytest.approx(100 * sum(right) / 21)}
    assert result.images == 21
    reason = 'image file is truncated'
    assert result.broken == [(str(images / 'b' / BROKEN), pytest.approx(result.broken[0][1]))]
    assert reason in result.broken[0][1]
    for own, start, end in zip(result.per_class, (0, 5, 12), (5, 12, 21), strict=True):
        assert own.images == end - start
        assert own.top1 == pytest.approx(100 * sum(right[start:end]) / (end - start))

    listed = (tmp_path / 'out' / 'broken_images.txt').read_text()
    assert listed == f'{images}/b/{BROKEN}\t{result.broken[0][1]}\n'
    written = {row['file']: int(row['prediction']) for row in rows(result.files['predictions'])}
    assert written == {str(path): prediction for path, prediction in zip(paths, predictions, strict=True)}
    assert [int(row['images']) for row in rows(result.files['classes'])] == [5, 7, 9]
    assert json.loads(result.files['measures'].read_text())['metrics'] == result.metrics
    assert Image.open(result.files['confusion']).size > (1000, 500)


def test_a_broken_image_ends_an_evaluation_by_default_and_is_named(images, weights):
    for workers in (0, 1):
        with pytest.raises(ImageError, match=f'Cannot read the image {images}/b/{BROKEN}: image file is truncated'):
            evaluate(NAME, images, checkpoint=weights, workers=workers)


def test_preprocessing_is_the_models_own_unless_overridden(images, weights):
    config = resolve_model_data_config(timm.create_model(NAME))
    file = ImageFile(str(images / 'a' / '3.jpg'))
    for asked, changes in (
        ({}, {}),
        ({'img_size': 64, 'crop_pct': 0.5}, {'input_size': (3, 64, 64), 'crop_pct': 0.5}),
        ({'interpolation': 'nearest', 'crop_mode': 'squash'}, {'interpolation': 'nearest', 'crop_mode': 'squash'}),
    ):
        loaded = load_model(NAME, weights, **asked)
        expected = create_transform(**{**config, **changes}, is_training=False)(file.read())
        normalized = loaded.apply(lambda images: images, loaded.transform(file.read())[None])
        torch.testing.assert_close(normalized[0], expected)


def test_half_precision_is_close_and_another_precision_is_refused(images, weights):
    paths = whole(images)[:3]
    expected = logits_by_hand(weights, paths).softmax(dim=1).max(dim=1).values
    found = predict(NAME, paths, checkpoint=weights, amp='bf16')
    for each, probability in zip(found, expected.tolist(), strict=True):
        assert each.probabilities[0] == pytest.approx(probability, abs=0.1)
        assert each.probabilities[0] != probability
    with pytest.raises(ValueError, match="none, bf16, fp16, got 'half'"):
        load_model(NAME, weights, amp='half')


# Which classes are meant


@pytest.fixture(scope='module')
def subset(tmp_path_factory):
    """Nine images of three of ImageNet's classes, named as its validation images are, in an order of their own."""
    root = tmp_path_factory.mktemp('subset')
    generator = np.random.default_rng(1)
    for i, name in enumerate(('n02084071', 'n01491361', 'n01440764')):  # unknown, tiger shark (3), tench (0)
        for number in range(3):
            picture(root / name / f'ILSVRC2012_val_{3 * i + number + 1:08}.JPEG', generator)
    (root / 'n02084071').rename(root / 'n15075141')  # toilet tissue (999)
    return root


def by_hand(logits, labels, classes):
    """Percentages of the labels that are first, and first among `classes`."""
    among = torch.full_like(logits, float('-inf'))
    among[:, classes] = logits[:, classes]
    return [100 * (x.argmax(dim=1) == torch.tensor(labels)).float().mean().item() for x in (logits, among)]


def test_a_subset_of_imagenet_is_matched_by_wordnets_names(subset, weights_1k):
    result = evaluate(NAME, subset, checkpoint=weights_1k)
    paths = [*sorted(subset.glob('n01440764/*')), *sorted(subset.glob('n01491361/*')), *sorted(subset.glob('n15*/*'))]
    logits = logits_by_hand(weights_1k, paths, 1000)
    of_all, among = by_hand(logits, [0] * 3 + [3] * 3 + [999] * 3, [0, 3, 999])
    assert result.metrics['top1'] == pytest.approx(among)
    assert result.metrics['top1_of_all'] == pytest.approx(of_all)
    assert set(result.metrics) == {'top1', 'top1_of_all', 'top5_of_all'}
    assert [own.index for own in result.per_class] == [0, 3, 999]
    assert result.per_class[0].name == 'tench, Tinca tinca'


def test_real_labels_count_any_of_an_images_labels_and_leave_out_those_without(subset, weights_1k, tmp_path):
    files = [path for _, path in sorted((path.name, path) for path in subset.rglob('*.JPEG'))]
    order = logits_by_hand(weights_1k, files, 1000).argsort(dim=1, descending=True).tolist()
    real = [[row[0], 5] for row in order[:2]]  # right
    real += [[row[998], row[3]] for row in order[2:5]]  # among the first five
    real += [[], [order[6][999]], [], [order[8][5]]]  # none, wrong, none, just not among the first five
    (tmp_path / 'real.json').write_text(json.dumps(real))
    result = evaluate(NAME, subset, checkpoint=weights_1k, real_labels=tmp_path / 'real.json')
    assert result.real_images == 7
    assert result.metrics['real_top1'] == pytest.approx(100 * 2 / 7)
    assert result.metrics['real_top5'] == pytest.approx(100 * 5 / 7)
    (tmp_path / 'real.json').write_text(json.dumps(real[:8]))
    with pytest.raises(ValueError, match=r'val_00000009\.JPEG has no real labels.*1 to 8'):
        evaluate(NAME, subset, checkpoint=weights_1k, real_labels=tmp_path / 'real.json')


def test_real_labels_are_refused_for_models_of_other_classes(images, weights):
    with pytest.raises(ValueError, match="ImageNet-1k's classes; the model has 3 classes"):
        evaluate(NAME, images, checkpoint=weights, real_labels='timm')


def test_timms_copy_of_the_real_labels_is_whole():
    real = read_real_labels(None)
    assert len(real) == 50_000
    assert sum(not labels for labels in real) == 3163  # of the paper's: 46,837 images have labels


@pytest.mark.parametrize('form', ['lines', 'pairs', 'json', 'names'])
def test_folders_of_imagenet_v2s_kind_are_matched_by_a_class_map(images, weights_1k, tmp_path, form):
    """Its folders are called 0, 1, ..., 999: here three of them, as classes 7, 999 and 2."""
    root = shutil.copytree(images, tmp_path / 'v2')
    (root / 'b' / BROKEN).unlink()
    for name, number in (('a', '10'), ('b', '9'), ('c', '100')):
        (root / name).rename(root / number)
    names = ImageNetInfo().label_names()
    content = {
        'lines': '\n'.join({7: '10', 999: '9', 2: '100'}.get(i, f'other {i}') for i in range(1000)) + '\n',
        'pairs': '10,7\n9,999\n100,2\n',
        'json': json.dumps({'10': 7, '9': 999, '100': names[2]}),
        'names': f'10\t{names[7]}\n9\ttoilet tissue, toilet paper, bathroom tissue\n100\t{names[2]}\n',
    }[form]
    path = tmp_path / ('map.json' if form == 'json' else 'map.txt')
    path.write_text(content)
    result = evaluate(NAME, root, checkpoint=weights_1k, class_map=path)
    paths = [*sorted(root.glob('10/*')), *sorted(root.glob('9/*')), *sorted(root.glob('100/*'))]
    logits = logits_by_hand(weights_1k, paths, 1000)
    of_all, among = by_hand(logits, [7] * 5 + [999] * 7 + [2] * 9, [2, 7, 999])
    assert result.metrics['top1'] == pytest.approx(among)
    assert result.metrics['top1_of_all'] == pytest.approx(of_all)
    assert [(own.index, own.folder, own.images) for own in result.per_class] == [
        (2, '100', 9),
        (7, '10', 5),
        (999, '9', 7),
    ]


def test_all_folders_in_order_are_the_classes_and_unknown_ones_are_refused(tmp_path):
    classes = [str(i) for i in range(12)]
    assert match_classes(classes, classes) == (list(range(12)), 'by the order of the folders')
    assert match_classes(['b', 'a'], ['first', 'second', 'third'], trained_on=['a', 'x', 'b'])[0] == [2, 0]
    with pytest.raises(ValueError, match=r'3 classes \(x, y, z, ...\) and the model 12'):
        match_classes(['x', 'y', 'z'], classes)
    with pytest.raises(ValueError, match="1 class folders are not in the model's classes: y"):
        match_classes(['a', 'y'], ['1', '2'], trained_on=['a', 'b'])
    with pytest.raises(ValueError, match="'x' the class 12, which the model lacks; indices go from 0 to 11"):
        match_classes(['x'], classes, class_map={'x': 12})
    with pytest.raises(ValueError, match='1 class folders are not in the class map: z'):
        match_classes(['x', 'z'], classes, class_map={'x': 1})
    with pytest.raises(ValueError, match=r"WordNet's names of the model's 1000 classes: n99999999"):
        match_classes(['n01440764', 'n99999999'], model_classes(1000)[0])
    (tmp_path / 'map.csv').write_text('a,1\nb\n')
    with pytest.raises(ValueError, match=r'one or two columns in every line, got \[1, 2\]'):
        read_class_map(tmp_path / 'map.csv')
    (tmp_path / 'map.csv').write_text('a,1\na,2\n')
    with pytest.raises(ValueError, match="names the folder 'a' twice"):
        read_class_map(tmp_path / 'map.csv')


def test_names_are_from_the_file_or_imagenets_by_their_number(tmp_path):
    assert model_classes(1000)[0][999].startswith('toilet tissue')
    assert len(model_classes(21841)[0]) == 21841
    assert model_classes(3) == (['0', '1', '2'], 'their indices')
    (tmp_path / 'names.txt').write_text('one\ntwo\n')
    assert model_classes(2, tmp_path / 'names.txt')[0] == ['one', 'two']
    with pytest.raises(ValueError, match='has 2 names, but the model 3 classes'):
        model_classes(3, tmp_path / 'names.txt')


def test_logits_that_are_not_numbers_are_counted_and_wrong(images, weights, tmp_path):
    state = torch.load(weights, weights_only=True)
    state['fc.bias'][1] = float('nan')
    torch.save(state, tmp_path / 'nan.pth')
    result = evaluate(NAME, images, checkpoint=tmp_path / 'nan.pth', on_error='skip', out=tmp_path / 'out')
    assert result.not_numbers == 21
    assert result.metrics == {'top1': 0}


def test_shards_are_evaluated_by_their_indices(images, weights, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    paths = whole(images)
    for number, own in enumerate((paths[:4], paths[4:])):
        with tarfile.open(tmp_path / f'{number:04}.tar', 'w') as tar:
            for i, path in enumerate(own):
                (tmp_path / 'label').write_text(str('abc'.index(path.parent.name)))
                tar.add(path, f'{i:04}.jpg')
                tar.add(tmp_path / 'label', f'{i:04}.cls')
    result = evaluate(NAME, tmp_path, reader='wds/', checkpoint=weights, workers=1)
    assert result.matched == 'by their indices'
    assert result.metrics == evaluate(NAME, images, checkpoint=weights, on_error='skip').metrics
    assert [own.images for own in result.per_class] == [5, 7, 9]


# Which model is meant


def test_a_checkpoint_without_the_models_classifier_is_refused(weights, weights_1k):
    assert load_model(NAME, weights).model.num_classes == 3
    with pytest.raises(ValueError, match='no classifier of 10 classes for test_resnet, which would predict at random'):
        load_model(NAME, weights_1k, num_classes=10)
    assert load_model(NAME, weights_1k, num_classes=10, classifies=False).model.num_classes == 10


def test_features_need_no_classifier(images, weights, tmp_path):
    state_dict = torch.load(weights, weights_only=True)
    torch.save({key: value for key, value in state_dict.items() if not key.startswith('fc.')}, tmp_path / 'body.pth')
    paths = whole(images)[:2]
    with pytest.raises(zoo.CheckpointError, match=r'2 missing \(fc\.weight, fc\.bias\)'):
        predict(NAME, paths, checkpoint=tmp_path / 'body.pth')
    body = extract_features(NAME, paths, tmp_path / 'body.npy', checkpoint=tmp_path / 'body.pth')
    entire = extract_features(NAME, paths, tmp_path / 'whole.npy', checkpoint=weights)
    assert np.array_equal(np.load(body.path), np.load(entire.path))


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('test_resnt',), "no model, config or folder of a run 'test_resnt'. Near: test_resnet"),
        (('quickstart/biformer_digits',), 'was not trained here'),
        (('halonet_h0',), 'no pretrained weights to download; give a checkpoint'),
        ((NAME, 'missing.pth'), 'There is no checkpoint missing.pth'),
    ],
)
def test_what_is_not_there_is_named(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_model(*arguments)


TRANSFORM = {'type': 'timm_transform', 'input_size': 64, 'crop_pct': 1.0, 'interpolation': 'bilinear'}


@pytest.fixture(scope='module')
def options(colours):
    steps = [{'type': 'Resize', 'size': (65, 63)}, {'type': 'PILToTensor'}]
    data = {'type': 'LabelledImages', 'root': str(colours), 'transform': steps, '_delete_': True}
    return {
        'model.backbone': {'name': NAME, 'num_classes': 3, '_delete_': True},
        'train_cfg.max_epochs': 1,
        'train_dataloader.dataset': {**data, 'split': 'train'},
        'val_dataloader.dataset': {**data, 'split': 'test', 'transform': TRANSFORM},
        'custom_hooks': [],
    }


@pytest.fixture(scope='module')
def run(options, tmp_path_factory):
    return train('quickstart/biformer_digits', tmp_path_factory.mktemp('run'), cfg_options=options)


def test_a_run_is_evaluated_as_it_validated_itself(run, colours):
    result = evaluate(run.work_dir, colours / 'test')
    assert result.metrics['top1'] == run.metrics['top1']
    assert [own.name for own in result.per_class] == ['blue', 'green', 'red']
    best = evaluate(run.work_dir, colours / 'test', checkpoint=run.best)
    assert best.metrics == result.metrics  # there was one validation
    larger = load_model(run.work_dir, img_size=96, crop_pct=0.5)
    image = Image.open(colours / 'test' / 'red' / '3.png')
    expected = create_transform(input_size=96, crop_pct=0.5, interpolation='bilinear', normalize=False)
    assert torch.equal(larger.transform(image), expected(image))


def test_a_runs_own_transform_is_taken_whole(run, colours, tmp_path):
    folder = shutil.copytree(run.work_dir, tmp_path / 'copy')
    checkpoint = torch.load(run.checkpoint, weights_only=True)
    steps = "[dict(type='Resize', size=(40, 50)), dict(type='PILToTensor')]"
    checkpoint['meta']['cfg'] += f'\nval_dataloader = dict(dataset=dict(transform={steps}))\n'
    torch.save(checkpoint, folder / run.checkpoint.name)
    assert load_model(folder).transform(Image.open(colours / 'test' / 'red' / '3.png')).shape == (3, 40, 50)
    with pytest.raises(ValueError, match='validated with its own transform, which has no img_size'):
        load_model(folder, img_size=64)


def test_a_runs_config_is_read_without_running_it(run, tmp_path):
    folder = shutil.copytree(run.work_dir, tmp_path / 'copy')
    path = folder / run.checkpoint.name
    checkpoint = torch.load(path, weights_only=True)
    checkpoint['meta']['cfg'] += f'\nx = open({str(tmp_path / "made")!r}, "w")\n'
    torch.save(checkpoint, path)
    assert load_model(folder).trained_on == ['blue', 'green', 'red']
    assert not (tmp_path / 'made').exists()


def test_a_torn_checkpoint_is_called_one(run, tmp_path):
    content = run.best.read_bytes()
    (tmp_path / 'torn.pth').write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r'torn\.pth is not a whole checkpoint'):
        load_model(run.work_dir, tmp_path / 'torn.pth')


# Predictions


def test_predictions_are_the_most_probable_classes_in_the_order_of_the_files(images, weights, tmp_path):
    (tmp_path / 'names.txt').write_text('one\ntwo\nthree')
    loaded = load_model(NAME, weights, names=tmp_path / 'names.txt')
    found = predict(loaded, [images / 'b', images / 'a' / '0.jpg', f'{images}/c/[12].jpg'], k=2, batch_size=3)
    files = [images / 'b' / f'{i}.jpg' for i in range(7)]
    files += [images / 'b' / BROKEN, images / 'a' / '0.jpg', images / 'c' / '1.jpg', images / 'c' / '2.jpg']
    assert [each.name for each in found] == [str(path) for path in files]
    assert 'truncated' in found[7].error
    assert found[7].classes == []
    readable = [each for each in found if each.error is None]
    expected = logits_by_hand(weights, [each.name for each in readable]).softmax(dim=1).sort(dim=1, descending=True)
    assert [each.indices for each in readable] == expected.indices[:, :2].tolist()
    assert readable[0].classes == [('one', 'two', 'three')[i] for i in readable[0].indices]
    for each, probabilities in zip(readable, expected.values.tolist(), strict=True):
        assert each.probabilities == pytest.approx(probabilities[:2], abs=1e-5)
    assert len(predict(loaded, [files[0]], k=9)[0].classes) == 3


# Features


def test_features_are_what_the_classifier_sees_or_a_levels_mean(images, weights, tmp_path):
    paths = whole(images)[:6]
    model = timm.create_model(NAME, num_classes=3, checkpoint_path=str(weights)).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    batch = torch.stack([transform(Image.open(path).convert('RGB')) for path in paths])
    with torch.no_grad():
        maps = model.forward_intermediates(batch, intermediates_only=True)
        expected = {
            None: model.forward_head(model.forward_features(batch), pre_logits=True),
            'layer2': maps[2].mean(dim=(2, 3)),
            '-1': maps[-1].mean(dim=(2, 3)),
        }
    for layer, values in expected.items():
        result = extract_features(NAME, paths, tmp_path / f'{layer}.npy', layer, checkpoint=weights, batch_size=4)
        array = np.load(result.path)
        assert array.dtype == np.float32
        torch.testing.assert_close(torch.from_numpy(array), values, rtol=1e-4, atol=1e-5)
        assert [row['name'] for row in rows(result.names)] == [str(path) for path in paths]
    with pytest.raises(ValueError, match=r"no layer 'layer9'. Layers: .*layer2"):
        extract_features(NAME, paths, tmp_path / 'none.npy', 'layer9', checkpoint=weights)


def test_features_of_folders_shards_and_all_formats_are_the_same(images, weights, tmp_path):
    shards = tmp_path / 'shards'
    shards.mkdir()
    files = sorted(images.rglob('*.jpg'))
    for number, own in enumerate((files[:9], files[9:])):
        with tarfile.open(shards / f'{number:04}.tar', 'w') as tar:
            for i, path in enumerate(own):
                tar.add(path, f'{i:04}.jpg')
                (tmp_path / 'label').write_text('0')
                tar.add(tmp_path / 'label', f'{i:04}.cls')
    arguments = {'checkpoint': weights, 'on_error': 'skip', 'batch_size': 4, 'part_size': 8}
    folder = extract_features(NAME, [images], tmp_path / 'folder.npy', **arguments)
    sharded = extract_features(NAME, [shards], tmp_path / 'shards.safetensors', workers=1, **arguments)
    assert folder.images == sharded.images == 21
    expected = np.load(folder.path)
    assert np.array_equal(load_file(sharded.path)['features'], expected)
    assert rows(sharded.names)[9]['name'] == f'{shards}/0001.tar/0000.jpg'
    assert folder.broken_list.read_text().startswith(f'{images}/b/{BROKEN}\t')
    assert folder.broken[0][1] == sharded.broken[0][1]
    left = {path.name for path in tmp_path.iterdir()} - {'shards', 'label'}
    kinds = ('', '.names.csv', '.json', '.broken_images.txt')
    assert left == {name + kind for name in ('folder.npy', 'shards.safetensors') for kind in kinds}

    parquet = pytest.importorskip('pyarrow.parquet')
    table = parquet.read_table(extract_features(NAME, [images], tmp_path / 'all.parquet', **arguments).path)
    assert table['name'].to_pylist() == [str(path) for path in files if path.name != BROKEN]
    assert np.array_equal(np.array(table['features'].to_pylist(), np.float32), expected)


def test_parquet_without_pyarrow_says_what_to_install(images, weights, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    with pytest.raises(ImportError, match=r'pip install .*parquet'):
        extract_features(NAME, [images], tmp_path / 'x.parquet', checkpoint=weights)
    with pytest.raises(ValueError, match=r'\.npy, \.parquet, \.safetensors, got x\.csv'):
        extract_features(NAME, [images], tmp_path / 'x.csv', checkpoint=weights)


def test_features_killed_and_started_again_are_the_same_bytes_and_keep_what_was_done(
    images, weights, tmp_path, monkeypatch
):
    arguments = {'checkpoint': weights, 'on_error': 'skip', 'batch_size': 2, 'part_size': 4, 'device': 'cpu'}
    expected = extract_features(NAME, [images] * 8, tmp_path / 'whole.npy', **arguments)
    out = tmp_path / 'parts.npy'
    call = f'extract_features({NAME!r}, [{str(images)!r}] * 8, {str(out)!r}, **{arguments!r})'
    code = f'from pathlib import *; import torch; torch.set_num_threads(1)\nfrom zoo.train.features import *\n{call}'
    process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = tmp_path / 'parts.npy.parts'
    deadline = time.monotonic() + 120
    while len(list(folder.glob('*.safetensors'))) < 5 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(list(folder.glob('*.safetensors')))
    assert 5 <= done < 44
    assert not out.exists()

    read = []
    monkeypatch.setattr(ImageFile, 'read', lambda self, mode, read_=ImageFile.read: read.append(1) or read_(self, mode))
    with pytest.raises(ImageError, match=BROKEN):
        extract_features(NAME, [images] * 8, out, **{**arguments, 'on_error': 'raise'})
    done, read[:] = len(list(folder.glob('*.safetensors'))), []
    result = extract_features(NAME, [images] * 8, out, **arguments)
    assert len(read) == 176 - 4 * done
    assert out.read_bytes() == expected.path.read_bytes()
    assert result.names.read_bytes() == expected.names.read_bytes()
    assert not folder.exists()
    assert extract_features(NAME, [images] * 8, out, **arguments) == result  # complete: nothing is read
    assert len(read) == 176 - 4 * done
    with pytest.raises(FileExistsError, match=r'a result of another call \(layer: None there, 1 now\)'):
        extract_features(NAME, [images] * 8, out, 1, **arguments)
    assert out.read_bytes() == expected.path.read_bytes()
    changed = extract_features(NAME, [images], out, 1, overwrite=True, **arguments)
    assert (changed.images, changed.channels) == (21, 32)


# Several processes


def worker(rank, port, images, weights, folder):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='localhost', MASTER_PORT=port)
    results = use(images, weights, folder)
    (folder / f'rank{rank}.json').write_text(json.dumps(results))


def use(images, weights, folder):
    """Evaluate, predict and extract features; what they give, but for the times and paths."""
    arguments = {'checkpoint': weights, 'on_error': 'skip', 'batch_size': 4}
    evaluation = evaluate(NAME, images, out=folder / 'out', **arguments)
    predictions = predict(NAME, [images], **arguments)
    features = extract_features(NAME, [images], folder / 'features.npy', part_size=4, **arguments)
    evaluation = replace(evaluation, seconds=0, files={key: path.name for key, path in evaluation.files.items()})
    return json.loads(
        json.dumps(
            [
                vars(evaluation) | {'per_class': [vars(own) for own in evaluation.per_class]},
                [(each.name, each.indices, each.error) for each in predictions],
                [features.images, features.broken],
            ]
        )
    )


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason='needs gloo')
def test_two_processes_give_what_one_does_of_an_uneven_number_of_images(images, weights, tmp_path):
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = str(free.getsockname()[1])
    one, two = tmp_path / 'one', tmp_path / 'two'
    for folder in (one, two):
        folder.mkdir()
    expected = use(images, weights, one)
    multiprocessing.start_processes(worker, (port, images, weights, two), nprocs=2, start_method='spawn')
    for rank in range(2):
        assert json.loads((two / f'rank{rank}.json').read_text()) == expected
    for name in ('features.npy', 'features.npy.names.csv', 'out/predictions.csv', 'out/classes.csv'):
        assert (two / name).read_bytes() == (one / name).read_bytes(), name


# Images


def test_images_are_found_in_the_order_of_inputs_and_names(images, tmp_path):
    names = [Path(image.name).relative_to(images).as_posix() for image in find_images([images])]
    assert names == sorted(path.relative_to(images).as_posix() for path in images.rglob('*.jpg'))
    (tmp_path / 'notes.txt').write_text('no image')
    for given, message in (
        (tmp_path, 'holds no images'),
        (tmp_path / 'gone.jpg', 'no file or folder .*gone.jpg'),
        (f'{tmp_path}/*.png', r'no file or folder .*\*.png'),
    ):
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            find_images([given])
    with tarfile.open(tmp_path / 'x.tar', 'w') as tar:
        tar.add(images / 'a' / '0.jpg', '0.jpg')
    (tmp_path / 'cut.tar').write_bytes((tmp_path / 'x.tar').read_bytes()[:900])
    with pytest.raises(ValueError, match=r'cut.tar is not a whole tar file'):
        find_images([tmp_path / 'cut.tar'])
    with pytest.raises(ValueError, match=r'x.tar.gz is compressed'):
        find_images([shutil.copy(tmp_path / 'x.tar', tmp_path / 'x.tar.gz')])
