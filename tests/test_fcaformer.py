"""FcaFormer's own: forward cross attention, biases at any size, what passes between blocks."""

import parity_rule as rule
import pytest
import timm
import torch
from conftest import tiny
from torch.export import Dim

import zoo
from zoo.backbones.fcaformer import CrossTokens, ForwardCrossAttention, between_pixels, resized

TABLES = ('attention_biases', 's_token_bias', 's_scale_factors')


def with_tables(model):
    """Biases and scales that do something, and blocks that weigh as much as their shortcuts."""
    for name, parameter in model.named_parameters():
        if name.endswith(TABLES):
            torch.nn.init.normal_(parameter, 1 if name.endswith('factors') else 0)
        elif name.endswith('gamma'):
            torch.nn.init.ones_(parameter)
    return model.eval()


@pytest.mark.parametrize('name', [name for name in rule.record_names() if name.startswith('fcaformer')])
def test_what_follows_a_downsampler_is_the_official_one(name, tmp_path):
    record = rule.load_record(name)
    torch.save({'model': rule.checkpoint(record)}, tmp_path / 'official.pth')
    model = zoo.create_model(record['name'], checkpoint=tmp_path / 'official.pth', dtype=torch.float64).eval()
    seen = {}
    for key in record['modules']:
        model.get_submodule(key).register_forward_hook(lambda _, args, out, key=key: seen.update({key: out}))
    with torch.inference_mode():
        model(rule.image(record['size']))
    for key, stage in record['modules'].items():
        x = seen[key].permute(0, 3, 1, 2) if len(stage['shape']) == 4 else seen[key].flatten(1, 2)
        want = torch.tensor(stage['samples'], dtype=torch.float64)
        assert list(x.shape) == stage['shape']
        assert (rule.samples(x, 16) - want).norm() < 1e-9 * want.norm()


def test_pixels_attend_to_all_pixels_and_to_the_tokens_of_earlier_blocks():
    attn = with_tables(ForwardCrossAttention(6, 2, (5, 6), sources=2, dtype=torch.float64))
    x = torch.randn(3, 5, 6, 6, dtype=torch.float64)
    cross_tokens = torch.randn(2, 3, 2, 2, 6, dtype=torch.float64)
    got = attn(x, list(cross_tokens))
    scaled = cross_tokens.transpose(0, 1).flatten(1, 3) * attn.s_scale_factors
    for image in range(3):
        for head in range(2):
            channels = slice(3 * head, 3 * head + 3)
            pixels, tokens = attn.norm1(x[image].flatten(0, 1)), attn.s_norm(scaled[image])
            query = attn.qkv(pixels)[:, :6][:, channels]
            both = attn.qkv(torch.cat((pixels, tokens)))
            key, value = both[:, 6:12][:, channels], both[:, 12:][:, channels]
            scores = query @ key.T * 3**-0.5
            table = attn.attention_biases[head].view(5, 6)
            for i in range(30):
                for j in range(30):
                    scores[i, j] += table[abs(i // 6 - j // 6), abs(i % 6 - j % 6)]
            scores[:, 30:] += attn.s_token_bias[0, head]
            mixed = scores.softmax(-1) @ value
            part = torch.linalg.solve(attn.proj.weight, (got[image].flatten(0, 1) - attn.proj.bias).T).T
            torch.testing.assert_close(part[:, channels], mixed, rtol=1e-9, atol=1e-9)


def test_a_block_sees_the_tokens_of_all_before_it_or_of_the_nearest_twelve():
    model = tiny('fcaformer_l1', depths=(1, 1, 14, 1))
    blocks = model.stages[2].blocks
    assert [block.attn.sources for block in blocks] == [*range(13), 12]
    assert blocks[13].dw_conv is None
    sizes = []
    for block in blocks:
        block.register_forward_hook(lambda _, args, out: sizes.append(len(out) if isinstance(out, tuple) else 0))
    model(torch.randn(2, 3, 64, 96)).sum().backward()
    assert sizes == [*range(2, 15), 0]
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize('side', [1, 2, 3, 5])
def test_every_weight_of_cross_tokens_gets_its_gradient_in_bfloat16(side):
    tokens = CrossTokens(48, dtype=torch.bfloat16)
    x = torch.randn(2, side, side, 48, dtype=torch.bfloat16)
    for _ in range(5):
        tokens.zero_grad()
        poison = [torch.full((tokens.weight.numel(),), float('nan'), dtype=torch.bfloat16) for _ in range(8)]
        del poison  # memory that the gradient may be written to
        tokens(x).float().square().sum().backward()
        assert tokens.weight.grad.isfinite().all()


def test_tables_keep_their_corners_and_are_linear_between_them():
    table = torch.randn(3, 14, 5, dtype=torch.float64)
    assert resized(table, (14, 5)) is table
    larger = resized(table, (27, 9))
    torch.testing.assert_close(larger[:, ::2, ::2], table)
    torch.testing.assert_close(larger[:, 1::2, ::2], (table[:, 1:] + table[:, :-1]) / 2)
    torch.testing.assert_close(resized(table, (1, 1)), table[:, :1, :1])
    assert between_pixels(table).shape == (3, 70, 70)


@pytest.mark.parametrize('size', [(96, 160), (70, 33), (320, 224)])
def test_a_checkpoint_for_another_size_computes_as_the_model_that_interpolates(size, tmp_path):
    model = with_tables(tiny('fcaformer_l1', dtype=torch.float64))
    torch.save(model.state_dict(), tmp_path / 'at_224.pth')
    arguments = dict(zip(('dims', 'depths', 'num_heads'), ((16, 32, 32, 48), (1, 1, 3, 2), (0, 0, 2, 3)), strict=True))
    other = zoo.create_model(
        'fcaformer_l1', checkpoint=tmp_path / 'at_224.pth', img_size=size, dtype=torch.float64, **arguments
    ).eval()
    map_size = tuple(-(-side // 16) for side in size)
    assert other.stages[2].blocks[1].attn.map_size == map_size
    assert other.stages[2].blocks[1].attn.attention_biases.shape[1] == map_size[0] * map_size[1]
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(other(x), model(x), rtol=1e-10, atol=1e-10)


def test_exports_with_free_batch_and_size():
    model = with_tables(tiny('fcaformer_l1', dtype=torch.float64))
    sizes = {0: Dim('batch', min=1, max=64), 2: Dim('height', min=129, max=2048), 3: Dim('width', min=129, max=2048)}
    example = torch.randn(2, 3, 258, 390, dtype=torch.float64)
    program = torch.export.export(model, (example,), dynamic_shapes=(sizes,)).module()
    for batch, size in enumerate([(129, 130), (224, 224), (250, 333)], start=1):
        x = torch.randn(batch, 3, *size, dtype=torch.float64)
        torch.testing.assert_close(program(x), model(x), rtol=1e-10, atol=1e-10)


def test_heads_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(ValueError, match=r'num_heads must divide dims, got \(0, 0, 5, 10\)'):
        timm.create_model('fcaformer_l1', num_heads=(0, 0, 5, 10))
