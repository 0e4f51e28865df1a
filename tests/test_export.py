"""`zoo.export`: the file computes what the model does, at every size that it takes, or there is no file."""

import json
import os
import subprocess
import sys

import onnx
import onnxruntime
import onnxscript
import pytest
import safetensors
import timm
import torch
from conftest import TINY, tiny
from safetensors.torch import load_file
from typer.testing import CliRunner

import zoo
from zoo import exporting
from zoo.cli import app
from zoo.exporting import ExportError, Sides

VAN = TINY['van_b0']


def run_onnx(path, images):
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return [torch.from_numpy(x) for x in session.run(None, {'images': images.numpy()})]


def shapes_in(values):
    return [[dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values]


@pytest.fixture
def weights(tmp_path):
    """A file of weights of a small VAN of ten classes, and the model that they are of."""
    model = tiny('van_b0', num_classes=10).eval()
    path = tmp_path / 'weights.pth'
    torch.save(model.state_dict(), path)
    return path, model


def test_onnx_has_the_maps_of_a_checkpoint_free_sizes_by_name_and_the_preprocessing(weights, tmp_path):
    checkpoint, model = weights
    path = tmp_path / 'van.onnx'
    written = zoo.export('van_b0', path, checkpoint=checkpoint, num_classes=10, **VAN)
    images = torch.randn(3, 3, 35, 87)
    _, expected = model.forward_intermediates(images)
    found = run_onnx(path, images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    file = onnx.load(path)
    assert shapes_in(file.graph.input) == [['batch', 3, 'height', 'width']]
    names = [f'features_{i}' for i in range(4)]
    assert [value.name for value in file.graph.output] == names
    levels = zip(VAN['dims'], (4, 8, 16, 32), strict=True)
    shapes = [['batch', channels, f'ceil(height/{s})', f'ceil(width/{s})'] for channels, s in levels]
    assert shapes_in(file.graph.output) == shapes
    metadata = {entry.key: entry.value for entry in file.metadata_props}
    assert metadata['name'] == 'van_b0'
    assert json.loads(metadata['mean']) == pytest.approx(zoo.info('van_b0')['mean'])

    assert written.path == path
    assert written.bytes == path.stat().st_size
    assert written.sides == Sides(1, 33)
    assert [output.name for output in written.outputs] == names
    assert all(0 < output.difference < 1e-5 for output in written.outputs)
    assert (3, 3, 59, 33) in written.checked
    assert {images[0] for images in written.checked} == {1, 2, 3}


def test_lengths_that_the_graph_does_not_know_get_no_name():
    """onnxruntime would take them for equal, and let one buffer serve for all."""
    unknown, known = onnxscript.ir.SymbolicDim(None), onnxscript.ir.SymbolicDim('s1 + 2')
    assert exporting._known_by(unknown, {'s1': 'height'}) is unknown
    assert exporting._known_by(known, {'s1': 'height'}) == 'height + 2'
    assert exporting._known_by(7, {}) == 7


def test_pt2_in_plain_operations_needs_torch_alone(tmp_path):
    model = tiny('nat_mini').eval()
    path = tmp_path / 'nat.pt2'
    written = zoo.export(model, path, image_size=(64, 96), dynamic='batch')
    assert written.image_shape == ('batch', 3, 64, 96)
    assert [output.shape for output in written.outputs] == [('batch', 1000)]
    images = torch.randn(3, 3, 64, 96)
    torch.save(images, tmp_path / 'images.pth')
    code = (
        'import sys, torch\n'
        'extra = {"metadata.json": ""}\n'
        'program = torch.export.load("nat.pt2", extra_files=extra)\n'
        'torch.save([program.module()(torch.load("images.pth")), extra["metadata.json"]], "out.pth")\n'
        'assert "zoo" not in sys.modules\n'
    )
    run = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (logits,), metadata = torch.load(tmp_path / 'out.pth')
    with torch.no_grad():
        torch.testing.assert_close(logits, model(images), rtol=1e-4, atol=1e-5)
    assert json.loads(metadata)['name'] == 'nat_mini'


def test_pt2_keeps_the_operators_where_that_is_asked_for(tmp_path):
    written = zoo.export(tiny('maxvit_tiny'), tmp_path / 'maxvit.pt2', operators=True, dynamic=False, image_size=64)
    program = torch.export.load(written.path)
    targets = {str(node.target) for node in program.graph.nodes}
    assert any(target.startswith('zoo.') for target in targets)
    assert written.image_shape == (1, 3, 64, 64)
    assert written.checked == ((1, 3, 64, 64),)


def test_safetensors_load_into_the_model_and_say_what_they_are(weights, tmp_path):
    checkpoint, model = weights
    path = tmp_path / 'van.safetensors'
    zoo.export('van_b0', path, checkpoint=checkpoint, num_classes=10, **VAN)
    found, expected = load_file(path), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    with safetensors.safe_open(path, 'pt') as file:
        metadata = file.metadata()
    assert metadata['name'] == 'van_b0'
    assert metadata['num_classes'] == '10'
    assert json.loads(metadata['std']) == pytest.approx(zoo.info('van_b0')['std'])
    again = zoo.create_model('van_b0', checkpoint=path, num_classes=10, **VAN)
    assert torch.equal(again.head.fc.weight, model.head.fc.weight)
    assert os.stat(path).st_mode & 0o777 == os.stat(checkpoint).st_mode & 0o777


def test_a_fused_classifier_and_a_model_of_other_channels(tmp_path):
    plain = zoo.export('van_b0', tmp_path / 'a.onnx', outputs='logits', dynamic=False, image_size=64, in_chans=4, **VAN)
    fused = zoo.export(
        'van_b0', tmp_path / 'b.onnx', outputs='logits', dynamic=False, image_size=64, in_chans=4, fuse=True, **VAN
    )
    for written in (plain, fused):
        assert written.image_shape == (1, 4, 64, 64)
        assert [output.name for output in written.outputs] == ['logits']
    plain, fused = (
        sum(node.op_type == 'BatchNormalization' for node in onnx.load(written.path).graph.node)
        for written in (plain, fused)
    )
    assert fused < plain


def test_the_opset_is_that_asked_for(tmp_path):
    zoo.export(tiny('van_b0'), tmp_path / 'van.onnx', dynamic=False, image_size=64, opset=20)
    assert {entry.version for entry in onnx.load(tmp_path / 'van.onnx').opset_import if not entry.domain} == {20}


def test_a_module_stays_as_it_is(tmp_path):
    model = tiny('van_b0').train().double()
    zoo.export(model, tmp_path / 'van.pt2', dynamic=False, image_size=64)
    assert model.training
    assert all(parameter.dtype == torch.float64 and parameter.requires_grad for parameter in model.parameters())


def test_large_weights_lie_beside(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, 'EXTERNAL_DATA', 0)
    model = tiny('van_b0').eval()
    written = zoo.export(model, tmp_path / 'van.onnx', dynamic=False, image_size=64)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['van.onnx', 'van.onnx.data']
    assert written.beside == tmp_path / 'van.onnx.data'
    assert written.bytes > written.beside.stat().st_size > 400_000
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(run_onnx(written.path, images), [model(images)], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('wrong', ['value', 'nan', 'shape', 'refusal'])
def test_a_file_that_computes_something_else_is_not_written(wrong, tmp_path, monkeypatch):
    def spoiled(path):
        def run(images):
            if wrong == 'refusal':
                raise RuntimeError('no such kernel')
            x = tiny_model(images)
            if wrong == 'shape':
                return [x[:, 1:]]
            x[0, 0] += float('nan') if wrong == 'nan' else 1e-3 * x.abs().max()
            return [x]

        return run

    tiny_model = tiny('van_b0').eval().requires_grad_(False)
    monkeypatch.setattr(exporting, '_onnx_runner', spoiled)
    path = tmp_path / 'van.onnx'
    path.write_text('an earlier file')
    message = {'refusal': 'does not run .*no such kernel', 'shape': 'gives logits as'}.get(wrong, 'logits by')
    with pytest.raises(ExportError, match=message):
        zoo.export(tiny_model, path, dynamic=False, image_size=64)
    assert path.read_text() == 'an earlier file'
    assert list(tmp_path.iterdir()) == [path]


def test_a_family_without_free_sizes_says_what_works(tmp_path):
    message = r"not possible: .*dynamic='batch' \(--fixed-size\).*dynamic=False \(--static\)"
    with pytest.raises(ExportError, match=message):
        zoo.export(tiny('maxvit_tiny'), tmp_path / 'maxvit.onnx')
    assert not list(tmp_path.iterdir())


def test_a_size_that_a_family_does_not_take_freely_is_said(tmp_path):
    with pytest.raises(ExportError, match=r'multiples of 224 from 224: 320x224 is none of them'):
        zoo.export(tiny('biformer_tiny'), tmp_path / 'biformer.onnx', image_size=(320, 224))
    with pytest.raises(ExportError, match=r'multiples of 256 from 256: 224x224 is none of them'):
        zoo.export(tiny('biformer_tiny', n_win=8), tmp_path / 'biformer.onnx', image_size=224)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(path='van.tflite'), "format must be one of onnx, pt2, safetensors, got 'van.tflite'"),
        (dict(format='tflite'), "format must be one of onnx, pt2, safetensors, got 'tflite'"),
        (dict(format='pt2'), r"called \*.pt2, got 'van.onnx'"),
        (dict(model='van_b9'), 'There is no model'),
        (dict(outputs='maps'), "outputs must be one of features, logits, got 'maps'"),
        (dict(dynamic='size'), "dynamic must be True, False or 'batch', got 'size'"),
        (dict(image_size=(64,)), r'image_size must be a positive int or .height, width., got .64,.'),
        (dict(operators=True), "onnx doesn't know them"),
        (dict(path='van.pt2', opset=20), "pt2 doesn't have one"),
        (dict(path='van.safetensors', fuse=True), 'no outputs, image size or fusion'),
        (dict(window=7), 'could not be made with'),
        (dict(model=torch.nn.Identity(), outputs='logits'), 'outputs can be given with a name'),
        (dict(model=torch.nn.Linear(2, 2, device='meta')), 'meta device'),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message, tmp_path):
    arguments = {'model': 'van_b0', 'path': 'van.onnx', **arguments}
    with pytest.raises(ValueError, match=message):
        zoo.export(arguments.pop('model'), tmp_path / arguments.pop('path'), **arguments)
    assert not list(tmp_path.iterdir())


def test_there_must_be_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match='There is no folder'):
        zoo.export('van_b0', tmp_path / 'nowhere' / 'van.onnx')


def test_the_command_reads_the_classes_off_a_checkpoint_and_shows_what_it_wrote(weights, tmp_path):
    checkpoint, model = weights
    path = tmp_path / 'van.pt2'
    arguments = ['export', 'van_b0', '--format', 'pt2', '--output', path, '--checkpoint', checkpoint, '--logits']
    arguments += ['--image-size', 64, 96, '--static']
    for key, value in VAN.items():
        arguments += ['--model-kwargs', f'{key}={value}']
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    for words in ('1 x 3 x 64 x 96', 'logits', '1 x 10', 'differs by', 'MB'):
        assert words in result.output
    assert 'random' not in result.output
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(path).module()(images), (model(images),))


def test_the_command_says_what_is_wrong_in_a_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ['export', 'van_b0', '--format', 'tflite'])
    assert result.exit_code == 1
    assert 'Error: format must be one of onnx, pt2, safetensors' in result.output
    assert not list(tmp_path.iterdir())


FAMILIES = {  # image sides that a graph of theirs takes, if it can be free
    'biformer_tiny': Sides(224, 224),
    'maxvit_tiny': None,
    'van_b0': Sides(1, 33),
    'nat_mini': Sides(1, 224),
    'dinat_mini': Sides(1, 224),
    'crossformer_tiny': Sides(32, 256),
    'shvit_s1': Sides(1, 65),
    'transnext_micro': Sides(32, 64),
}


@pytest.mark.parametrize(
    'name',
    [
        name if name in ('shvit_s1', 'transnext_micro') else pytest.param(name, marks=pytest.mark.slow)
        for name in FAMILIES
    ],
)
def test_a_graph_of_a_fixed_size_of_each_family(name, tmp_path):
    written = zoo.export(name, tmp_path / 'model.pt2', dynamic='batch', image_size=(64, 96), **TINY.get(name, {}))
    levels = timm.create_model(name, features_only=True, device='meta').feature_info
    assert len(written.outputs) == len(levels.reduction())
    program = torch.export.load(written.path).module()
    maps = program(torch.randn(3, 3, 64, 96))
    assert [x.shape[0] for x in maps] == [3] * len(maps)


@pytest.mark.slow
@pytest.mark.parametrize('name', FAMILIES)
def test_onnx_of_the_whole_model_of_each_family(name, tmp_path):
    sides = FAMILIES[name]
    written = zoo.export(name, tmp_path / 'model.onnx', dynamic=True if sides else 'batch')
    assert written.sides == sides
    assert max(output.difference for output in written.outputs) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize('name', FAMILIES)
def test_pt2_with_operators_of_each_family_is_free_in_size(name, tmp_path):
    written = zoo.export(name, tmp_path / 'model.pt2', operators=True, outputs='logits', **TINY.get(name, {}))
    assert written.sides == (FAMILIES[name] or Sides(1, 33))
