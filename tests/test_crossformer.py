"""CrossFormer's groups, biases and patches are those of the paper and of the authors' code, at every size."""

import parity_rule as rule
import pytest
import timm
import torch
from conftest import tiny
from torch.nn import functional as F

import zoo
from zoo.backbones.crossformer import CrossScaleEmbedding, DynamicPositionBias, GroupAttention, PatchMerging


def images(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def padded_and_masked(attn, x, group_size, interval):
    """Group attention as the authors compute it: tokens padded with zeros, masked as keys, and cropped at the end."""
    B, H, W, C = x.shape
    block = group_size * interval
    bottom, right = -H % block, -W % block
    heads, pixels = attn.num_heads, group_size**2

    def groups(x):
        rows, columns = x.shape[1] // block, x.shape[2] // block
        x = x.reshape(len(x), rows, group_size, interval, columns, group_size, interval, -1)
        return x.permute(0, 1, 4, 3, 6, 2, 5, 7).reshape(-1, pixels, x.shape[-1])

    mask = F.pad(torch.zeros(1, H, W, 1, dtype=x.dtype), (0, 0, 0, right, 0, bottom), value=-1e6).expand(B, -1, -1, -1)
    tokens = groups(F.pad(x, (0, 0, 0, right, 0, bottom)))
    q, k, v = attn.qkv(tokens).view(-1, pixels, 3, heads, C // heads).permute(2, 0, 3, 1, 4)
    scores = q * (C // heads) ** -0.5 @ k.mT + attn.pos(group_size, group_size) + groups(mask)[:, None, None, :, 0]
    tokens = attn.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, pixels, C))
    grid = (H + bottom) // block, (W + right) // block
    tokens = tokens.view(B, *grid, interval, interval, group_size, group_size, C)
    return tokens.permute(0, 1, 5, 3, 2, 6, 4, 7).reshape(B, H + bottom, W + right, C)[:, :H, :W]


@pytest.mark.parametrize('interval', [1, 2, 4])
@pytest.mark.parametrize('size', [(12, 24), (11, 9), (5, 17)])
def test_groups_at_the_border_are_what_padding_and_masking_gives(size, interval):
    attn = GroupAttention(32, 4, 3, interval, dtype=torch.float64)
    x = images(2, *size, 32)
    torch.testing.assert_close(attn(x), padded_and_masked(attn, x, 3, interval), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('size', [(7, 7), (5, 5), (1, 1), (6, 9), (12, 3)])
def test_a_map_with_a_side_no_longer_than_a_group_is_one_group(size):
    attn = GroupAttention(32, 4, 7, 2, dtype=torch.float64)
    x = images(2, *size, 32)
    torch.testing.assert_close(attn(x), padded_and_masked(attn, x, max(size), 1), rtol=1e-12, atol=1e-12)


def test_the_bias_depends_on_the_offset_alone():
    pos = DynamicPositionBias(32, 4, dtype=torch.float64)
    bias = pos(4, 6).view(4, 4, 6, 4, 6)
    torch.testing.assert_close(bias[:, 1:, 2:, 1:, 2:], bias[:, :-1, :-2, :-1, :-2])
    torch.testing.assert_close(bias[:, :3, :5, :3, :5], pos(3, 5).view(4, 3, 5, 3, 5))
    offset = torch.tensor([[-2.0, 3.0]], dtype=torch.float64)  # of the query from the key: rows, columns
    expected = pos.pos3(pos.pos2(pos.pos1(pos.pos_proj(offset))))[0]
    torch.testing.assert_close(bias[:, 1, 4, 3, 1], expected)


def test_a_small_image_changes_nothing_for_those_after_it():
    model = tiny('crossformer_tiny', features_only=True).eval()
    x = torch.randn(1, 3, 128, 160)
    before = model(x)
    model(torch.randn(1, 3, 64, 64))
    assert all(torch.equal(y, again) for y, again in zip(before, model(x), strict=True))


@pytest.mark.parametrize('size', [(64, 32), (33, 46)])
def test_the_embedding_is_four_convolutions_of_the_image(size):
    embed = CrossScaleEmbedding(3, 32, dtype=torch.float64)
    x = images(2, 3, *size).requires_grad_()
    padded = F.pad(x, (0, -size[1] % 4, 0, -size[0] % 4))
    maps = [F.conv2d(padded, proj.weight, proj.bias, proj.stride, proj.padding) for proj in embed.projs]
    assert [proj.kernel_size[0] for proj in embed.projs] == [4, 8, 16, 32]
    expected = embed.norm(torch.cat(maps, dim=1).permute(0, 2, 3, 1))
    torch.testing.assert_close(embed(x), expected, rtol=1e-12, atol=1e-12)
    inputs = (x, *embed.parameters())
    grad = torch.randn_like(expected)
    for actual, wanted in zip(
        torch.autograd.grad(embed(x), inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-11, atol=1e-11)


def test_merging_pads_odd_maps_with_zeros_after_the_norm():
    merge = PatchMerging(8, dtype=torch.float64)
    x = images(2, 5, 8, 8)
    padded = F.pad(merge.norm(x).permute(0, 3, 1, 2), (0, 0, 0, 1))
    maps = [F.conv2d(padded, conv.weight, conv.bias, 2, conv.padding) for conv in merge.reductions]
    assert merge(x).shape == (2, 3, 4, 16)
    torch.testing.assert_close(merge(x), torch.cat(maps, dim=1).permute(0, 2, 3, 1))


@pytest.mark.parametrize(
    ('name', 'cooled'), [('crossformer_small', []), ('crossformer_pp_small', [f'2.{j}' for j in (2, 5, 8, 11, 14)])]
)
def test_every_third_block_is_cooled_in_crossformer_pp(name, cooled):
    model = timm.create_model(name, device='meta')
    found = [
        f'{i}.{j}'
        for i, stage in enumerate(model.stages)
        for j, block in enumerate(stage.blocks)
        if hasattr(block, 'ex_conv')
    ]
    assert found == cooled


def test_blocks_attend_at_short_and_long_distance_by_turns():
    model = timm.create_model('crossformer_small', device='meta')
    intervals = [[block.attn.interval for block in stage.blocks] for stage in model.stages]
    assert intervals == [[1, 8], [1, 4], [1, 2] * 3, [1, 1]]


@pytest.fixture(scope='module')
def official():
    return {k: v.float() for k, v in rule.checkpoint(rule.load_record('crossformer__crossformer_tiny')).items()}


def test_buffers_in_the_first_releases_checkpoints_are_left_out(official, tmp_path):
    stored = {
        'layers.0.blocks.0.attn.biases': torch.zeros(169, 2),
        'layers.0.blocks.0.attn.relative_position_index': torch.zeros(49, 49, dtype=torch.int64),
        'layers.0.blocks.0.attn_mask': torch.zeros(64, 49, 49),
    }
    torch.save({'model': official | stored}, tmp_path / 'w.pth')
    model = zoo.create_model('crossformer_tiny', checkpoint=tmp_path / 'w.pth')
    assert torch.equal(model.stages[1].downsample.norm.weight, official['layers.0.downsample.norm.weight'])


def test_images_of_one_channel_sum_the_convolutions_of_every_scale(official, tmp_path):
    torch.save({'model': official}, tmp_path / 'w.pth')
    model = zoo.create_model('crossformer_tiny', checkpoint=tmp_path / 'w.pth', in_chans=1)
    for i, proj in enumerate(model.stages[0].downsample.projs):
        expected = official[f'patch_embed.projs.{i}.weight'].sum(1, keepdim=True)
        torch.testing.assert_close(proj.weight, expected)
