"""DHVT's own: head tokens, convolutions of patches at any size, the contract of a transformer of one width."""

from unittest import mock

import parity_rule as rule
import pytest
import timm
import torch
from conftest import TINY, tiny
from timm.models._manipulate import group_parameters
from torch.export import Dim

import zoo
from zoo.backbones import dhvt
from zoo.backbones.dhvt import DynamicAggregation, HeadInteractedAttention

NAME = 'dhvt_tiny_imagenet_patch16'


@pytest.mark.parametrize('name', [name for name in rule.record_names() if name.startswith('dhvt')])
def test_tokens_are_the_official_ones(name, tmp_path):
    record = rule.load_record(name)
    torch.save({'model': rule.checkpoint(record)}, tmp_path / 'official.pth')
    model = zoo.create_model(record['name'], checkpoint=tmp_path / 'official.pth', dtype=torch.float64).eval()
    seen = {}
    for key in record['modules']:
        model.get_submodule(key).register_forward_hook(lambda _, args, out, key=key: seen.update({key: out}))
    with torch.inference_mode():
        model(rule.image(record['size']))
    for key, stage in record['modules'].items():
        want = torch.tensor(stage['samples'], dtype=torch.float64)
        x = seen[key].reshape(stage['shape'])
        assert (rule.samples(x, 16) - want).norm() < 1e-9 * want.norm()
        assert x.norm().item() == pytest.approx(stage['norm'], rel=1e-9)


def test_each_head_has_a_token_that_speaks_to_the_class_token():
    attn = HeadInteractedAttention(6, 2, dtype=torch.float64).eval()
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    tokens = []
    for head in range(2):
        made = attn.ht_proj(x[:, :, 3 * head : 3 * head + 3].mean(1))  # (B, C)
        parts = [torch.nn.functional.gelu(attn.ht_norm(part)) for part in made.split(3, dim=1)]
        tokens.append(torch.cat(parts, dim=1) + attn.pos_embed[0, head])
    every = torch.cat((x, torch.stack(tokens, dim=1)), dim=1)
    query, key, value = attn.qkv(every).chunk(3, dim=-1)
    mixed = [
        (q @ k.mT * 3**-0.5).softmax(-1) @ v
        for q, k, v in zip(query.split(3, -1), key.split(3, -1), value.split(3, -1), strict=True)
    ]
    want = attn.proj(torch.cat(mixed, dim=-1))
    want[:, 0] += want[:, 5:].mean(1)
    torch.testing.assert_close(attn(x), want[:, :5])


@pytest.mark.parametrize('size', [(4, 4), (3, 7)])
def test_patches_are_convolved_in_their_rows_and_weigh_the_class_token(size):
    mlp = DynamicAggregation(8, dtype=torch.float64).eval()
    x = torch.randn(2, 1 + size[0] * size[1], 8, dtype=torch.float64)
    got = mlp(x, size)
    hidden = mlp.act(mlp.bn1(mlp.fc1(x[:, 1:].unflatten(1, size)))).permute(0, 3, 1, 2)
    hidden = hidden + mlp.act(mlp.bn2(mlp.dwconv(hidden)))
    patches = mlp.bn3(mlp.fc2(hidden.permute(0, 2, 3, 1)))
    weights = mlp.excitation(mlp.act(mlp.compress(patches.mean((1, 2)))))
    torch.testing.assert_close(got[:, 1:], patches.flatten(1, 2))
    torch.testing.assert_close(got[:, 0], x[:, 0] * weights)


@pytest.mark.parametrize(('patch_size', 'name'), [(2, 'dhvt_tiny_cifar_patch2'), (4, 'dhvt_tiny_cifar_patch4')])
def test_small_patches_are_a_token_each(patch_size, name):
    model = timm.create_model(name, embed_dim=32, depth=2, features_only=True, out_indices=(0, 1)).eval()
    for x in model(torch.randn(2, 3, 33, 46)):
        assert x.shape == (2, 32, -(-33 // patch_size), -(-46 // patch_size))


def test_gradient_checkpointing_recomputes_every_block():
    model = tiny(NAME)
    model.set_grad_checkpointing()
    with mock.patch.object(dhvt, 'checkpoint', wraps=dhvt.checkpoint) as calls:
        model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert calls.call_count == len(model.blocks)


def test_layers_for_learning_rate_decay_follow_the_depth():
    model = tiny(NAME)
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert {layers[key] for key in layers if key.startswith(('patch_embed', 'cls_token'))} == {0}
    assert all(layers[key] == 1 + int(key.split('.')[1]) for key in layers if key.startswith('blocks.'))
    assert {layers[key] for key in layers if key.startswith('head')} == {4}


def test_tokens_and_maps_of_the_blocks_are_the_same():
    model = tiny(NAME, dtype=torch.float64).eval()
    x = torch.randn(2, 3, 50, 96, dtype=torch.float64)
    final, maps = model.forward_intermediates(x, return_prefix_tokens=True, norm=True)
    assert [tuple(patches.shape) for patches, _ in maps] == [(2, 32, 4, 6)] * 3
    assert torch.equal(torch.cat((maps[-1][1], maps[-1][0].flatten(2).mT), dim=1), final)
    tokens = model.forward_intermediates(x, indices=[1], output_fmt='NLC', intermediates_only=True)
    assert torch.equal(tokens[0], model.get_intermediate_layers(x, n=[1])[0])
    with pytest.raises(ValueError, match='no attn_mask'):
        model.forward_intermediates(x, attn_mask=torch.zeros(1))


def test_a_checkpoint_loads_for_images_of_another_number_of_channels(tmp_path):
    model = tiny(NAME)
    torch.nn.init.normal_(model.patch_embed.pre_affine.alpha)
    torch.save(model.state_dict(), tmp_path / 'rgb.pth')
    gray = zoo.create_model(NAME, checkpoint=tmp_path / 'rgb.pth', in_chans=1, **TINY[NAME])
    affine = gray.patch_embed.pre_affine
    assert affine.alpha.item() == pytest.approx(model.patch_embed.pre_affine.alpha.mean().item(), rel=1e-6)
    assert gray(torch.randn(2, 1, 64, 64)).shape == (2, 1000)


def test_pointwise_convolutions_begin_as_convolutions():
    convolution = torch.nn.Conv2d(192, 768, 1)
    for again in (False, True):
        model = timm.create_model(NAME, depth=1)
        if again:
            model.init_weights()
        assert model.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(convolution.weight.std().item(), rel=0.05)
        assert model.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.3)


def test_exports_with_free_batch_and_size():
    model = tiny(NAME, dtype=torch.float64).eval()
    sizes = {0: Dim('batch', min=1, max=64), 2: Dim('height', min=33, max=2048), 3: Dim('width', min=33, max=2048)}
    example = torch.randn(2, 3, 66, 99, dtype=torch.float64)
    program = torch.export.export(model, (example,), dynamic_shapes=(sizes,)).module()
    for batch, size in enumerate([(33, 34), (224, 224), (97, 250)], start=1):
        x = torch.randn(batch, 3, *size, dtype=torch.float64)
        torch.testing.assert_close(program(x), model(x), rtol=1e-10, atol=1e-10)


def test_what_it_has_no_use_for_is_refused():
    with pytest.raises(TypeError, match='DHVT does not take mlp_ratio, qk_norm'):
        timm.create_model(NAME, mlp_ratio=2, qk_norm=True)
    with pytest.raises(ValueError, match='patch_size must be one of 2, 4, 16, got 8'):
        timm.create_model(NAME, patch_size=8)
    with pytest.raises(ValueError, match='got 5 and 192'):
        timm.create_model(NAME, num_heads=5)
    model = tiny(NAME)
    model.set_input_size((96, 128))
    assert model.patch_embed.grid_size == (6, 8)
    with pytest.raises(ValueError, match='patch_size can only be chosen when the model is made, got 8'):
        model.set_input_size(patch_size=8)


def test_a_foreign_checkpoint_is_told_from_its_own(tmp_path):
    torch.save(tiny('illama_tiny').state_dict(), tmp_path / 'illama.pth')
    with pytest.raises(zoo.CheckpointError, match=f'does not fit {NAME}'):
        zoo.create_model(NAME, checkpoint=tmp_path / 'illama.pth')
