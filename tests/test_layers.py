"""Layers that families share compute what they say, whichever way they take."""

import pytest
import torch
from timm.layers import apply_rot_embed_cat

from zoo.backbones.illama import rotary_embedding, rotated
from zoo.backbones.layers import biased_attention


@pytest.mark.parametrize('scale', [None, 0.7])
@pytest.mark.parametrize('needs_grad', [True, False])
def test_biased_attention_is_the_formula(scale, needs_grad):
    query, key, value, bias = (
        torch.randn(shape, dtype=torch.float64).requires_grad_(needs_grad)
        for shape in ((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4), (3, 5, 7))
    )
    logits = torch.einsum('bhnc,bhmc->bhnm', query, key) * (scale or 4**-0.5) + bias
    expected = torch.einsum('bhnm,bhmc->bhnc', logits.softmax(-1), value)
    found = biased_attention(query, key, value, bias, scale)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    if needs_grad:
        inputs, weight = (query, key, value, bias), torch.randn_like(expected)
        for own, reference in zip(
            torch.autograd.grad((found * weight).sum(), inputs),
            torch.autograd.grad((expected * weight).sum(), inputs),
            strict=True,
        ):
            torch.testing.assert_close(own, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_biased_attention_keeps_the_dtype(dtype):
    query, key, value = torch.randn(3, 2, 3, 5, 4, dtype=dtype)
    bias = torch.randn(3, 5, 5, dtype=dtype, requires_grad=True)
    assert biased_attention(query, key, value, bias).dtype == dtype
    with torch.no_grad():
        assert biased_attention(query, key, value, bias).dtype == dtype


def test_pairs_turn_alike_by_complex_numbers_and_by_real_ones(monkeypatch):
    rotation = rotary_embedding(9, 8).double()
    tokens = torch.randn(2, 9, 3, 8, dtype=torch.float64).transpose(1, 2)  # not contiguous
    expected = apply_rot_embed_cat(tokens, rotation)
    torch.testing.assert_close(rotated(tokens, rotation), expected, rtol=0, atol=1e-14)
    monkeypatch.setattr('torch.compiler.is_compiling', lambda: True)
    assert torch.equal(rotated(tokens, rotation), expected)
