"""MaxViT is timm's model under other names: every size that timm takes, every checkpoint that timm has."""

import math

import pytest
import timm
import torch
from conftest import tiny
from timm.layers import DropPath
from timm.models.maxxvit import default_cfgs
from torch.nn import functional as F

import zoo
from zoo.backbones import catalogue
from zoo.backbones.layers import SameConv2d
from zoo.backbones.maxvit import Attention, TransformerBlock, average_pool

EXACT = dict(rtol=1e-10, atol=1e-10)  # float64, through about ten layers
SIZES = ('tiny', 'small', 'base', 'large', 'xlarge')
TIMM_TINY = dict(embed_dim=(32, 64, 64, 96), depths=(1, 1, 2, 1), stem_width=32, head_hidden_size=96)


def of_timm(window_size: int, **kwargs):
    """timm's model of the size of `tiny('maxvit_tiny')`, with weights and statistics that hide no term."""
    windows = dict(transformer_window_size=(window_size,) * 2, transformer_grid_size=(window_size,) * 2)
    model = timm.create_model('maxvit_tiny_tf_224', dtype=torch.float64, **TIMM_TINY, **windows, **kwargs).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith('running_var'):
                tensor.uniform_(0.5, 2)
            elif tensor.ndim == 1 or name.endswith('table'):
                tensor.add_(torch.randn_like(tensor), alpha=0.5)
    return model


def loaded_from(model, **kwargs):
    overlay = dict(state_dict=model.state_dict())
    return tiny('maxvit_tiny', pretrained=True, pretrained_cfg_overlay=overlay, dtype=torch.float64, **kwargs).eval()


@pytest.mark.parametrize(
    ('window_size', 'size'),
    [
        (7, (224, 224)),
        (7, (448, 224)),
        (4, (128, 128)),
        (4, (128, 256)),
        (1, (97, 130)),  # where timm takes odd sizes: nothing to partition
    ],
)
def test_logits_and_levels_equal_timms(window_size, size):
    want = of_timm(window_size)
    model = loaded_from(want, window_size=window_size)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.inference_mode():
        final, maps = want.forward_intermediates(x)
        own_final, own_maps = model.forward_intermediates(x)
        torch.testing.assert_close(model(x), want(x), **EXACT)
    torch.testing.assert_close(own_final, final, **EXACT)
    for own, level in zip(own_maps, maps, strict=True):
        torch.testing.assert_close(own, level, **EXACT)


def test_gradients_equal_timms():
    want = of_timm(2)
    model = loaded_from(want, window_size=2)
    x = torch.randn(2, 3, 64, 128, dtype=torch.float64)
    for each in (model, want):
        each(x).square().sum().backward()
    grads = {name: p.grad for name, p in want.named_parameters()}
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-9, atol=1e-9 * grads[name].abs().max().item())


@pytest.mark.parametrize('is_grid', [False, True])
@pytest.mark.parametrize('size', [(3, 5), (2, 3), (1, 1)])
def test_padding_is_masked(is_grid, size):
    """A map that fits into one window is attended to as a whole, as if there were nothing beyond it."""
    attn = Attention(64, (3, 5), is_grid, dtype=torch.float64)
    x = torch.randn(2, *size, 64, dtype=torch.float64)
    H, W = size
    bias = attn.rel_pos().view(2, 3, 5, 3, 5)[:, :H, :W, :H, :W].reshape(2, H * W, H * W)
    q, k, v = attn.qkv(x).reshape(2, H * W, 3, 2, 32).permute(2, 0, 3, 1, 4)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(attn(x), attn.proj(want), **EXACT)


@pytest.mark.parametrize('is_grid', [False, True])
def test_pixels_see_their_window_alone(is_grid):
    """On a 7x5 map with windows of 3x2: contiguous ones, or every third row and column, cut where the map ends."""
    attn = Attention(32, (3, 2), is_grid, dtype=torch.float64)
    x = torch.randn(1, 7, 5, 32, dtype=torch.float64, requires_grad=True)
    rows, columns = torch.arange(7), torch.arange(5)
    row_window, column_window = (rows % 3, columns % 3) if is_grid else (rows // 3, columns // 2)
    for row, column in ((0, 0), (4, 3), (6, 4)):
        (grad,) = torch.autograd.grad(attn(x)[0, row, column].sum(), x)
        seen = grad[0].abs().sum(-1) > 0
        same = (row_window == row_window[row])[:, None] & (column_window == column_window[column])
        assert torch.equal(seen, same)


def test_a_bias_is_of_the_offset_from_query_to_key():
    rel_pos = Attention(32, (2, 3), False).rel_pos
    with torch.no_grad():
        rel_pos.relative_position_bias_table.copy_(torch.arange(15.0).view(1, 3, 5))
    bias = rel_pos().view(2, 3, 2, 3)
    for query in ((0, 0), (1, 0), (0, 2)):
        for key in ((0, 1), (1, 2)):
            row, column = key[0] - query[0] + 1, key[1] - query[1] + 2
            assert bias[(*query, *key)] == row * 5 + column


@pytest.mark.parametrize('size', [(4, 6), (5, 6), (7, 9)])
@pytest.mark.parametrize('stride', [1, 2])
def test_padding_of_convolutions_is_tensorflows(size, stride):
    conv = SameConv2d(2, 3, 3, stride, dtype=torch.float64)
    x = torch.randn(1, 2, *size, dtype=torch.float64)
    pads = []
    for side in reversed(size):
        total = max((math.ceil(side / stride) - 1) * stride + 3 - side, 0)  # TensorFlow's documentation of 'SAME'
        pads += [total // 2, total - total // 2]
    want = F.conv2d(F.pad(x, pads), conv.weight, conv.bias, stride)
    torch.testing.assert_close(conv(x), want, **EXACT)


def test_averages_count_zeros_beyond_an_odd_side():
    x = torch.tensor([[[[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]]])
    assert average_pool(x).tolist() == [[[[3, 2.25], [3.75, 2.25]]]]


def test_stochastic_depth_rises_by_stage_in_all_three_parts_of_a_block():
    model = timm.create_model('maxvit_tiny', drop_path_rate=0.4, device='meta')
    blocks = [block for stage in model.stages for block in stage.blocks]
    for i, block in enumerate(blocks):
        drops = [module for module in block.modules() if isinstance(module, DropPath)]
        assert [drop.drop_prob for drop in drops] == pytest.approx([0.4 * i / 10] * len(drops))
        assert len(drops) == (3 if i else 0)


@pytest.mark.parametrize('size', SIZES)
def test_tensors_are_timms(size):
    own = timm.create_model(f'maxvit_{size}', device='meta').state_dict()
    timms = timm.create_model(f'maxvit_{size}_tf_224', device='meta').state_dict()
    assert {key: value.shape for key, value in own.items()} == {key: value.shape for key, value in timms.items()}


@pytest.mark.parametrize('size', SIZES)
def test_weights_and_their_preprocessing_are_timms(size):
    listed = {entry['hf_hub_id']: entry['tag'] for entry in catalogue.info(f'maxvit_{size}')['weights']}
    published = {
        f'timm/{name}.{tag}': cfg
        for name, cfgs in default_cfgs.items()
        if name.startswith(f'maxvit_{size}_tf_')
        for tag, cfg in cfgs.cfgs.items()
    }
    assert listed.keys() == published.keys()
    for hub_id, tag in listed.items():
        own, timms = timm.get_pretrained_cfg(f'maxvit_{size}.{tag}'), published[hub_id]
        assert own.hf_hub_id == hub_id
        for field in ('input_size', 'num_classes', 'mean', 'std', 'crop_pct', 'interpolation', 'license'):
            assert getattr(own, field) == getattr(timms, field)
        assert own.crop_mode == timms.crop_mode
        assert not own.fixed_input_size


def test_a_checkpoint_of_other_windows_says_which(tmp_path):
    torch.save(of_timm(12).state_dict(), tmp_path / 'tf_384.pth')
    arguments = dict(checkpoint=tmp_path / 'tf_384.pth', dims=(32, 64, 64, 96), depths=(1, 1, 2, 1), stem_dim=32)
    with pytest.raises(zoo.CheckpointError, match=r'misshaped .* windows are 12x12: pass window_size=12, or'):
        zoo.create_model('maxvit_tiny', **arguments)
    assert zoo.create_model('maxvit_tiny', window_size=12, **arguments).window_size == (12, 12)
    with pytest.raises(zoo.CheckpointError) as error:
        zoo.create_model('maxvit_tiny', window_size=12, **arguments | dict(depths=(1, 1, 1, 1)))
    assert 'window_size' not in str(error.value)


@pytest.mark.parametrize('window_size', [14, (10, 16), 4])
def test_biases_of_a_checkpoint_are_resized_to_other_windows(window_size):
    want = of_timm(7)
    model = loaded_from(want, window_size=window_size, pretrained_window_size=7)
    assert model.state_dict().keys() == want.state_dict().keys()
    resized = {
        key: F.interpolate(
            tensor[None], [2 * side - 1 for side in model.window_size], mode='bilinear', align_corners=False
        )[0]
        if key.endswith('table')
        else tensor
        for key, tensor in want.state_dict().items()
    }
    other = tiny('maxvit_tiny', window_size=window_size, dtype=torch.float64).eval()
    other.load_state_dict(resized)
    x = torch.randn(2, 3, 128, 192, dtype=torch.float64)
    torch.testing.assert_close(model(x), other(x), rtol=0, atol=0)
    model(x).sum().backward()
    assert all(table.grad.any() for key, table in model.named_parameters() if key.endswith('table'))


def test_windows_may_be_oblong():
    model = tiny('maxvit_tiny', window_size=(4, 6)).eval()
    assert model(torch.randn(1, 3, 128, 192)).shape == (1, 1000)
    assert model.stages[0].blocks[0].attn_grid.attn.rel_pos().shape == (1, 24, 24)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(dims=(64, 100, 256, 512)), r'multiples of 32.*got \(64, 100, 256, 512\)'),
        (dict(window_size=0), r'window_size must be one or two positive ints, got 0'),
        (dict(pretrained_window_size=0), r'pretrained_window_size must be one or two positive ints, got 0'),
        (dict(window_size=(7, 7, 7)), r'got \(7, 7, 7\)'),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('maxvit_tiny', device='meta', **arguments)


def test_a_new_classifier_keeps_the_heads_hidden_layer():
    model = tiny('maxvit_tiny', num_classes=5).eval()
    hidden = model.head.pre_logits.fc.weight.clone()
    model.reset_classifier(9)
    assert torch.equal(model.head.pre_logits.fc.weight, hidden)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 9)


@pytest.mark.parametrize('level', range(5))
def test_a_pruned_model_has_a_plain_head_for_what_it_kept(level):
    model = tiny('maxvit_tiny')
    model.prune_intermediate_layers([level])
    assert not any(key.startswith('head') for key in model.state_dict())
    assert model.head_hidden_size == model.num_features == model.feature_info[level]['num_chs']
    model.reset_classifier(4, 'avg')
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 4)


def test_initial_weights_are_as_described():
    block = timm.create_model('maxvit_tiny').stages[2].blocks[1]
    depthwise, pointwise = block.conv.conv2_kxk.weight, block.conv.conv3_1x1.weight
    assert depthwise.std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.05)
    assert pointwise.std().item() == pytest.approx(math.sqrt(2 / 256), rel=0.05)
    for part in (block.attn_block, block.attn_grid):
        assert isinstance(part, TransformerBlock)
        bound = math.sqrt(6 / (256 + 768))
        assert 0.99 * bound < part.attn.qkv.weight.abs().max() <= bound
        assert part.attn.proj.bias.abs().max() == 0
        assert 0 < part.mlp.fc1.bias.abs().max() < 1e-5
        assert part.attn.rel_pos.relative_position_bias_table.std().item() == pytest.approx(0.02, rel=0.1)


def test_tables_of_biases_do_not_decay():
    model = tiny('maxvit_tiny', device='meta')
    assert len(model.no_weight_decay()) == 10
    assert all(key.endswith('.rel_pos.relative_position_bias_table') for key in model.no_weight_decay())
