"""What SpectFormer alone has: filters of any size, a class token, checkpoints in two wrappers."""

import parity_rule as rule
import pytest
import timm
import torch
from conftest import TINY, tiny
from torch.export import Dim

import zoo
from zoo.backbones.spectformer import SpectralGating

NAMES = ['spectformer_tiny', 'spectformer_h_s']


def relative(x, want):
    return ((x - want).norm() / want.norm()).item()


def gating(size, dim=3):
    return SpectralGating(dim, size, dtype=torch.float64)


def kernel(module):
    """The kernel (rows, columns, C) whose circular convolution the gating is."""
    weight = torch.view_as_complex(module.complex_weight.detach())
    return torch.fft.irfft2(weight, s=module.size, dim=(0, 1))


def convolved(x, taps):
    """Circular convolution of (B, H, W, C) by taps (rows, columns, C), whose first half lies after the pixel."""
    rows, columns = taps.shape[:2]
    out = torch.zeros_like(x)
    for i in range(rows):
        for j in range(columns):
            shift = ((i + rows // 2) % rows - rows // 2, (j + columns // 2) % columns - columns // 2)
            out += taps[i, j] * x.roll(shift, dims=(1, 2))
    return out


@pytest.mark.parametrize('trained', [(6, 6), (5, 7)])
@pytest.mark.parametrize('size', [(6, 6), (5, 7), (9, 8), (3, 4), (1, 2), (13, 5)])
def test_gating_is_one_convolution_at_every_size(trained, size):
    module = gating(trained)
    x = torch.randn(2, *size, 3, dtype=torch.float64)
    torch.testing.assert_close(module(x), convolved(x, kernel(module)))


@pytest.mark.parametrize('size', [(9, 8), (4, 3)])
def test_a_filter_resampled_for_good_is_what_it_was(size):
    module = gating((6, 6))
    module.requires_grad_(False)
    x = torch.randn(2, *size, 3, dtype=torch.float64)
    want = module(x)
    module.set_size(size)
    assert module.size == size
    assert not module.complex_weight.requires_grad
    torch.testing.assert_close(module(x), want)


@pytest.mark.parametrize('name', NAMES)
def test_an_input_size_that_is_set_changes_no_result(name):
    model = tiny(name, dtype=torch.float64).eval()
    x = torch.randn(1, 3, 320, 256, dtype=torch.float64)
    want = model(x)
    model.set_input_size((320, 256))
    assert relative(model(x), want) < 1e-10
    assert relative(tiny(name, img_size=(320, 256), dtype=torch.float64).eval()(x), want) > 1e-3  # other weights


def test_a_checkpoint_of_another_size_is_resampled(tmp_path):
    model = tiny('spectformer_h_s', num_classes=5).double().eval()
    torch.save(model.state_dict(), tmp_path / '224.pth')
    arguments = dict(num_classes=5, img_size=160, dtype=torch.float64)
    again = zoo.create_model('spectformer_h_s', checkpoint=tmp_path / '224.pth', **TINY['spectformer_h_s'], **arguments)
    assert again.stages[0].blocks[0].attn.size == (40, 40)
    x = torch.randn(1, 3, 160, 160, dtype=torch.float64)
    assert relative(again.eval()(x), model(x)) < 1e-10


def test_positions_and_filters_of_another_size_load(tmp_path):
    state_dict = rule.checkpoint(rule.load_record('spectformer__spectformer_ti_heads4'))
    torch.save({'model': state_dict}, tmp_path / 'w.pth')
    model = zoo.create_model('spectformer_tiny', checkpoint=tmp_path / 'w.pth', img_size=384)
    assert model.pos_embed.shape == (1, 24 * 24, 256)
    assert model.blocks[0].filter.complex_weight.shape == (24, 13, 256, 2)


def test_checkpoints_load_from_both_wrappers(tmp_path):
    state_dict = rule.checkpoint(rule.load_record('spectformer__spectformer_h_s_notoken'))
    state_dict = {key: value.float() for key, value in state_dict.items()}
    for wrapped in ({'state_dict': state_dict}, {'model': {'state_dict': state_dict}}):
        torch.save(wrapped, tmp_path / 'w.pth')
        model = zoo.create_model('spectformer_h_s_notoken', checkpoint=tmp_path / 'w.pth')
        assert torch.equal(model.head.norm.weight, state_dict['norm4.weight'])


@pytest.mark.parametrize('record', ['spectformer__spectformer_h_s', 'spectformer__spectformer_h_s_notoken'])
def test_tokens_after_class_attention_are_the_official_ones(record, tmp_path):
    record = rule.load_record(record)
    torch.save(rule.checkpoint(record), tmp_path / 'w.pth')
    model = zoo.create_model(record['name'], checkpoint=tmp_path / 'w.pth', dtype=torch.float64).eval()
    want = record['class_attention']
    with torch.inference_mode():
        x = model.forward_features(rule.image(record['size'])).flatten(1, 2)
        x = model.head.class_block(torch.cat((x.mean(1, keepdim=True), x), dim=1))
    assert list(x.shape) == want['shape']
    assert relative(rule.samples(x, 16), torch.tensor(want['samples'], dtype=torch.float64)) < 1e-9
    assert x.norm().item() == pytest.approx(want['norm'], rel=1e-9)


def test_the_greatest_logits_of_tokens_are_added_by_half():
    model = tiny('spectformer_h_s', num_classes=5, dtype=torch.float64).eval()
    plain = tiny('spectformer_h_s_notoken', num_classes=5, dtype=torch.float64).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if 'aux_fc' not in k})
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    tokens = model.head.norm(model.forward_features(x)).flatten(1, 2)
    torch.testing.assert_close(model(x), plain(x) + 0.5 * model.head.aux_fc(tokens).amax(1))


def test_sequences_are_asked_for_as_of_timms_vit():
    model = tiny('spectformer_tiny').eval()
    x = torch.randn(2, 3, 64, 90)
    final, maps = model.forward_intermediates(x)
    sequences = model.forward_intermediates(x, output_fmt='NLC', intermediates_only=True)
    assert final.shape == (2, 4 * 6, 32)
    for sequence, y in zip(sequences, maps, strict=True):
        assert torch.equal(sequence, y.flatten(2).mT)
    found = model.forward_intermediates(x, indices=1, output_dict=True)
    assert torch.equal(found['image_intermediates'][0], maps[-1])
    assert torch.equal(found['image_features'], final)
    assert torch.equal(model.get_intermediate_layers(x, norm=True)[0], final)


def test_a_pooling_that_the_head_does_not_have_is_refused():
    with pytest.raises(ValueError, match="must be 'token', or '' for none, got 'avg'"):
        tiny('spectformer_h_s', global_pool='avg')
    model = tiny('spectformer_h_s')
    with pytest.raises(ValueError, match="got 'max'"):
        model.reset_classifier(3, 'max')
    assert timm.create_model('spectformer_h_s', device='meta', num_classes=3, global_pool='').num_classes == 3


@pytest.mark.parametrize('name', NAMES)
def test_exports_with_free_batch(name):
    model = tiny(name, dtype=torch.float64).eval()
    example = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    program = torch.export.export(model, (example,), dynamic_shapes=({0: Dim('batch', min=1, max=64)},))
    x = torch.randn(3, 3, 64, 96, dtype=torch.float64)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-10, atol=1e-10)
