"""`zoo.accelerate` changes how timm's attention is computed, and nothing that can be seen but the time."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

import zoo
from zoo import acceleration

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}  # relative
SWIN = dict(embed_dim=32, depths=(2, 2), num_heads=(1, 2), num_classes=5)
MAXVIT = dict(embed_dim=(32, 64), depths=(1, 1), block_type=('M', 'M'), num_classes=5)
MODELS = {  # (timm's model, arguments, image sizes)
    'swin': ('swin_tiny_patch4_window7_224', dict(SWIN, img_size=64, window_size=4), [(64, 64)]),
    'swin with oblong windows': (
        'swin_tiny_patch4_window7_224',
        dict(SWIN, img_size=(96, 64), window_size=(6, 4), qkv_bias=False),
        [(96, 64)],
    ),
    'swin with windows that divide one level': (
        'swin_tiny_patch4_window7_224',
        dict(SWIN, img_size=(56, 72), window_size=7),
        [(56, 72)],
    ),
    'swin of any size': (
        'swin_tiny_patch4_window7_224',
        dict(SWIN, img_size=64, window_size=4, strict_img_size=False, always_partition=True),
        [(64, 64), (96, 32), (72, 60), (16, 32)],
    ),
    'swin of S3': ('swin_s3_tiny_224', dict(SWIN, img_size=64, window_size=(4, 2)), [(64, 64)]),
    'swin v2': ('swinv2_tiny_window8_256', dict(SWIN, img_size=64, window_size=4), [(64, 64)]),
    'swin v2 of any size': (
        'swinv2_tiny_window8_256',
        dict(SWIN, img_size=64, window_size=4, strict_img_size=False, always_partition=True),
        [(64, 64), (96, 32), (72, 60)],
    ),
    'swin v2 without biases of queries and values': (
        'swinv2_tiny_window8_256',
        dict(SWIN, img_size=64, window_size=4, qkv_bias=False),
        [(64, 64)],
    ),
    'maxvit': ('maxvit_tiny_tf_224', dict(MAXVIT, img_size=128), [(128, 128)]),
    'maxvit with heads first': ('maxvit_tiny_rw_224', dict(MAXVIT, img_size=128), [(128, 128)]),
    'maxvit with an MLP of positions': ('maxvit_rmlp_pico_rw_256', dict(MAXVIT, img_size=(96, 128)), [(96, 128)]),
}
ALL = pytest.mark.parametrize('case', MODELS)


def build(case, dtype=torch.float64, **kwargs):
    """A small model with parameters that are all random: timm's scale of a norm, or a bias, may begin with zeros."""
    name, arguments, _ = MODELS[case]
    torch.manual_seed(0)
    model = timm.create_model(name, **{**arguments, **kwargs}).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, 0, 0.1, generator=generator)
        elif isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias, 0, 0.1, generator=generator)
        for name in ('relative_position_bias_table', 'q_bias', 'v_bias'):
            if getattr(module, name, None) is not None:
                nn.init.normal_(getattr(module, name), generator=generator)
    return model.eval()


def images(size, dtype=torch.float64, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(2), dtype=dtype)


def pair(case, dtype=torch.float64, **kwargs):
    """timm's model, and the accelerated one."""
    model = build(case, dtype, **kwargs)
    accelerated = copy.deepcopy(model)
    assert zoo.accelerate(accelerated).changed
    return model, accelerated


def assert_close(found, wanted, name=''):
    difference = (found - wanted).norm() / wanted.norm().clamp_min(1e-30)
    assert difference <= TOLERANCE[wanted.dtype], f'{name} differs by {difference:.1e}'


def gradients(model, x):
    model.zero_grad()
    x = x.detach().requires_grad_()
    out = model(x)
    out.square().sum().backward()
    return {'output': out.detach(), 'images': x.grad, **{name: p.grad for name, p in model.named_parameters()}}


@ALL
@pytest.mark.parametrize('dtype', TOLERANCE)
def test_results_and_gradients_are_timms(case, dtype):
    model, accelerated = pair(case, dtype)
    for size in MODELS[case][2]:
        x = images(size, dtype)
        wanted = gradients(model, x)
        found = gradients(accelerated, x)
        exact = wanted if dtype == torch.float64 else gradients(copy.deepcopy(model).double(), x.double())
        scale = max(gradient.norm() for gradient in exact.values())
        for name in wanted:
            if exact[name].norm() < 1e-6 * scale:  # a bias of keys has no gradient but rounding
                continue
            own = (wanted[name] - exact[name]).norm() / exact[name].norm()  # where timm itself rounds more
            difference = (found[name] - wanted[name]).norm() / exact[name].norm()
            assert difference <= max(TOLERANCE[dtype], 3 * own), f'{name} differs by {difference:.1e}'
        with torch.no_grad():
            assert_close(accelerated(x), wanted['output'], 'output of inference')


@pytest.mark.parametrize('case', ['swin', 'swin v2', 'maxvit'])
@pytest.mark.parametrize('tokens', [1, 100, 10000])
def test_parts_of_a_batch_change_nothing(case, tokens, monkeypatch):
    monkeypatch.setattr(acceleration, 'TOKENS', tokens)
    model, accelerated = pair(case)
    x = images(MODELS[case][2][0], batch=3)
    with torch.inference_mode():
        assert_close(accelerated(x), model(x))


@pytest.mark.parametrize('case', ['swin', 'swin v2'])
@pytest.mark.parametrize('dropout', [{}, dict(proj_drop_rate=0.2), dict(attn_drop_rate=0.2)])
def test_training_draws_the_same_random_numbers(case, dropout):
    model, accelerated = pair(case, drop_path_rate=0.4, drop_rate=0.1, **dropout)
    x = images((64, 64), batch=4)
    found = []
    for each in (model, accelerated):
        each.train()
        torch.manual_seed(3)
        found.append(gradients(each, x))
    for name in ('output', 'images'):
        assert_close(found[1][name], found[0][name], name)


@ALL
def test_state_dicts_and_classes_come_back(case):
    model = build(case)
    classes = [type(module) for module in model.modules()]
    state = {name: (value, id(dict(model.named_parameters()).get(name))) for name, value in model.state_dict().items()}
    report = zoo.accelerate(model)
    assert [type(module) for module in model.modules()] != classes
    parameters = dict(model.named_parameters())
    after = {name: (value, id(parameters.get(name))) for name, value in model.state_dict().items()}
    assert after.keys() == state.keys()
    assert all(after[name][1] == state[name][1] for name in state)
    again = zoo.accelerate(model)
    assert not again.changed
    assert set(again.left.values()) == {'accelerated already'}
    assert zoo.restore(model) == list(report.changed) == list(again.left)
    assert [type(module) for module in model.modules()] == classes
    assert zoo.restore(model) == []


def test_what_it_computes_with_is_the_operator(monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return operator(*args, **kwargs)

    operator = acceleration.window_attention
    monkeypatch.setattr(acceleration, 'window_attention', counted)
    _, accelerated = pair('swin')
    x = images((64, 64))
    accelerated(x)
    assert len(calls) == 4
    with torch.autocast('cpu', torch.bfloat16), torch.no_grad():
        copy.deepcopy(accelerated).float()(x.float())
    accelerated.layers[0].blocks[0].attn.attn_drop.p = 0.5
    accelerated.layers[0].blocks[1].attn.softmax.register_forward_hook(lambda *_: None)
    accelerated.train()(x)
    assert len(calls) == 4 + 2  # the second level's blocks


def test_hooks_are_called():
    _, accelerated = pair('swin')
    block = accelerated.layers[0].blocks[1]
    seen = []
    for module in (block.attn, block.mlp.fc1, block.norm1):
        module.register_forward_hook(lambda module, inputs, output: seen.append((module, len(output))))
    with torch.no_grad():
        accelerated(images((64, 64)))
    assert {module for module, _ in seen} == {block.attn, block.mlp.fc1, block.norm1}
    assert len(seen) == 3


def test_a_perceptron_of_another_kind_is_called():
    model, accelerated = pair('swin')
    for each in (model, accelerated):
        each.layers[0].blocks[0].mlp.act = nn.Tanh()
        each.layers[1].blocks[0].mlp = nn.Identity()
    x = images((64, 64))
    with torch.no_grad():
        assert_close(accelerated(x), model(x))


def test_cosines_whose_scale_would_beat_the_mask_are_timms():
    model, accelerated = pair('swin v2')
    for each in (model, accelerated):
        for name, parameter in each.named_parameters():
            if name.endswith('logit_scale'):
                nn.init.constant_(parameter, 5)  # clamped at log(100)
    x = images((64, 64))
    with torch.no_grad():
        assert_close(accelerated(x), model(x))


@pytest.mark.parametrize('case', ['swin', 'swin v2'])
def test_sizes_change_afterwards_as_before(case):
    model, accelerated = pair(case)
    for each in (model, accelerated):
        each.set_input_size((96, 128), window_size=(6, 8))
    x = images((96, 128))
    with torch.no_grad():
        assert_close(accelerated(x), model(x))


@pytest.mark.parametrize('case', ['swin', 'swin v2'])
def test_features_checkpointing_copies_and_pickles(case):
    model, accelerated = (each.eval() for each in pair(case, features_only=True))
    x = images((64, 64))
    wanted = model(x)
    copies = accelerated, copy.deepcopy(accelerated), pickle.loads(pickle.dumps(accelerated))
    for each in copies:
        assert any(isinstance(module, acceleration.Accelerated) for module in each.modules())
        for one, other in zip(each(x), wanted, strict=True):
            assert_close(one, other)
    model, accelerated = pair(case)
    accelerated.set_grad_checkpointing()
    wanted, found = gradients(model, x), gradients(accelerated, x)
    for name in ('output', 'images'):
        assert_close(found[name], wanted[name], name)


@pytest.mark.parametrize('case', ['swin', 'swin v2'])
def test_graphs_are_whole_and_of_plain_operations(case):
    model, accelerated = pair(case)
    x = images((64, 64))
    torch._dynamo.reset()
    wanted = model(x)
    assert_close(torch.compile(accelerated, backend='aot_eager', fullgraph=True)(x), wanted)
    program = torch.export.export(accelerated, (x,))
    assert not any('zoo' in str(node.target) for node in program.graph.nodes)
    assert_close(program.module()(x), wanted)


def test_blocks_are_leaves_of_a_traced_graph():
    from timm.models import FeatureGraphNet

    model, accelerated = (FeatureGraphNet(each, out_indices=(0, 1)) for each in pair('swin'))
    x = images((64, 64))
    for one, other in zip(accelerated(x), model(x), strict=True):
        assert_close(one, other)


def test_the_report_says_what_was_left_and_why():
    report = zoo.accelerate(build('swin'))
    blocks = [f'layers.{i}.blocks.{j}' for i in range(2) for j in range(2)]
    assert set(report.changed) == {*blocks, 'layers.1.downsample'}
    assert str(report).startswith('5 modules accelerated, 0 left\n  layers.0.blocks.0    window_attention')

    class Mine(timm.models.swin_transformer.SwinTransformerBlock):
        pass

    model = build('swin')
    model.layers[0].blocks[1].__class__ = Mine
    report = zoo.accelerate(model)
    assert report.left == {
        'layers.0.blocks.1': 'Mine is a subclass of SwinTransformerBlock, and may compute something else'
    }
    assert str(zoo.accelerate(nn.Linear(2, 2))) == 'Nothing to accelerate: the model has no attention that zoo knows.'


@pytest.mark.parametrize(
    ('name', 'kwargs', 'reason'),
    [
        ('nat_mini', {}, "stands on the zoo's operators"),
        ('maxvit_tiny', {}, "stands on the zoo's operators"),
        ('shvit_s1', {}, 'measured'),
        ('halonet26t', {}, 'measured'),
        ('efficientvit_m0', {}, 'measured'),
        ('davit_tiny', {}, 'measured'),
        ('crossvit_tiny_240', {}, 'measured'),
        ('coatnet_nano_rw_224', {}, 'fused'),
        ('vit_tiny_patch16_224', {}, 'fused'),
    ],
)
def test_models_that_would_not_gain_stay_as_they_are(name, kwargs, reason):
    model = timm.create_model(name, device='meta', **kwargs)
    classes = [type(module) for module in model.modules()]
    report = zoo.accelerate(model)
    assert not report.changed
    assert report.left
    assert any(reason in why for why in report.left.values()), report
    assert [type(module) for module in model.modules()] == classes
    assert str(report).startswith('Nothing to accelerate.')
