"""Attention of tokens, its scores a tensor: iLLaMA, DHVT, FcaFormer, MoH."""

import torch
from torch.nn import functional as F

from zoo.backbones import dhvt, fcaformer, illama, moh, transnext
from zoo.backbones.layers import pairs

from .explicit import attend, merged, split

__all__ = ['FORMS']


class CausalAttention(illama.CausalAttention):
    """Rotary positions by a product of complex numbers; the mask a lower triangle."""

    def forward(self, x):
        B, N, C = x.shape
        query, key, value = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).unbind(2)
        query, key = (self.rotated(tokens).transpose(1, 2) for tokens in (query, key))
        weights = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1)
        causal = torch.ones(N, N, dtype=x.dtype, device=x.device).tril().roll((1, 1), (0, 1))  # class token: last
        weights = weights * (self.soft_mask_rate + (1 - self.soft_mask_rate) * causal)
        return self.proj((weights @ value.transpose(1, 2)).transpose(1, 2).reshape(B, N, C))

    @staticmethod
    def rotated(tokens):
        """(B, N, heads, head_dim) -> same."""
        _, length, _, head_dim = tokens.shape
        sine, cosine = illama.rotary_embedding(length, head_dim, tokens.device).roll(1, dims=0).chunk(2, dim=-1)
        turn = torch.complex(cosine[:, ::2].contiguous(), sine[:, ::2].contiguous())[:, None]
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        pairs = torch.view_as_complex(tokens.to(dtype).unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn.to(pairs.dtype)).flatten(3).to(tokens.dtype)


class HeadInteractedAttention(dhvt.HeadInteractedAttention):
    def forward(self, x):
        length = x.shape[1]
        x = torch.cat((x, self.head_tokens(x)), dim=1)
        x = self.proj(merged(attend(*split(self.qkv(x), 3, self.num_heads))))
        class_token, patches, heads = x.split([1, length - 1, self.num_heads], dim=1)
        return torch.cat((class_token + heads.mean(1, keepdim=True), patches), dim=1)


class ForwardCrossAttention(fcaformer.ForwardCrossAttention):
    """Pixels and cross tokens go through one projection each, queries of both, and their scores are concatenated."""

    def forward(self, x, cross_tokens=()):
        B, H, W, C = x.shape
        query, key, value = split(self.qkv(self.norm1(x.reshape(B, H * W, C))), 3, self.num_heads)
        query = query * query.shape[-1] ** -0.5
        table = fcaformer.resized(self.attention_biases.unflatten(1, self.map_size), (H, W))
        scores = query @ key.transpose(-2, -1) + fcaformer.between_pixels(table)
        if self.sources:
            scale, bias = self.of_cross_tokens(cross_tokens[0].shape[1:3])
            cross = torch.cat([tokens.flatten(1, 2) for tokens in cross_tokens], dim=1)
            _, cross_key, cross_value = split(self.qkv(self.s_norm(cross * scale)), 3, self.num_heads)
            scores = torch.cat([scores, query @ cross_key.transpose(-2, -1) + bias], dim=-1)
            value = torch.cat([value, cross_value], dim=2)
        return self.proj(merged(scores.softmax(-1) @ value)).reshape(B, H, W, C)


class Selection(moh.Selection):
    """The best scores by a mask that is a sum of one-hot vectors."""

    def forward(self, scores):
        best = scores.topk(self.count, dim=-1).indices
        kept = scores * F.one_hot(best, scores.shape[-1]).sum(-2)
        return kept / kept.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).eps) * self.count


class CosineAttention(transnext.Attention):
    """Attention of the last stage, its heads weighed by a router; the others' is an operator's formulation."""

    def forward(self, x):
        B, H, W, C = x.shape
        query, key, value = split(self.qkv(x.reshape(B, H * W, C)), 3, self.num_heads)
        length = torch.full((), H * W, dtype=torch.float64, device=x.device).log().to(x.dtype)
        query = (F.normalize(query, dim=-1) + self.query_embedding) * F.softplus(self.temperature) * length
        bias = pairs(*self.cpb((H, W), lambda size: size)).reshape(self.num_heads, H * W, H * W)
        out = attend(query, F.normalize(key, dim=-1), value, 1.0, bias)
        out = out.transpose(1, 2).reshape(B, H, W, self.num_heads, -1)
        return self.proj(transnext.gated(self.head_gate, x, out).reshape(B, H, W, C))


FORMS = {
    illama.ILLaMA: {illama.CausalAttention: CausalAttention},
    dhvt.DHVT: {dhvt.HeadInteractedAttention: HeadInteractedAttention},
    fcaformer.FcaFormer: {fcaformer.ForwardCrossAttention: ForwardCrossAttention},
    moh.MoHTransNeXt: {moh.Selection: Selection, transnext.Attention: CosineAttention},
}
