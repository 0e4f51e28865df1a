"""Few tokens that stand for many pixels: SViT's super tokens and GLNet's slots."""

import torch
from torch import nn
from torch.nn import functional as F

from zoo.backbones import glnet, stvit

__all__ = ['FORMS']


class PixelAttention(stvit.Attention):
    """Projections are convolutions of maps; keys down, queries across: the softmax is over the last axis but one."""

    def forward(self, x):
        B, _, H, W = x.shape
        qkv = F.conv2d(x, self.qkv.weight, self.qkv.bias)
        query, key, value = qkv.reshape(B, self.num_heads, -1, H * W).chunk(3, dim=2)
        scores = key.transpose(-1, -2) @ query * query.shape[2] ** -0.5
        return F.conv2d((value @ scores.softmax(-2)).reshape(B, -1, H, W), self.proj.weight, self.proj.bias)


class SuperTokenAttention(stvit.SuperTokenAttention):
    """Neighbors are unfolded and folded by convolutions whose kernels are unit matrices."""

    def forward(self, x):
        if self.stoken_size == 1:
            return self.stoken_refine(x)
        B, C, H, W = x.shape
        side = self.stoken_size
        x = F.pad(x, (0, -W % side, 0, -H % side))
        rows, columns = x.shape[2] // side, x.shape[3] // side
        cells = rows * columns
        kernels = torch.eye(stvit.CELLS, dtype=x.dtype, device=x.device).reshape(stvit.CELLS, 1, 3, 3)

        def unfolded(tokens):  # -> (B, cells, C, 9)
            around = F.conv2d(tokens.reshape(B * C, 1, rows, columns), kernels, padding=1)
            return around.reshape(B, C * stvit.CELLS, cells).transpose(1, 2).reshape(B, cells, C, stvit.CELLS)

        def folded(parts):  # (n, 9, rows, columns) -> (n, 1, rows, columns)
            return F.conv_transpose2d(parts, kernels, padding=1)

        super_tokens = F.adaptive_avg_pool2d(x, (rows, columns))
        pixels = x.reshape(B, C, rows, side, columns, side).permute(0, 2, 4, 3, 5, 1)
        pixels = pixels.reshape(B, cells, side * side, C)
        for _ in range(self.num_iters):
            with torch.no_grad():
                affinity = (pixels @ unfolded(super_tokens) * C**-0.5).softmax(-1)  # (B, cells, pixels of one, 9)
                count = folded(affinity.sum(2).transpose(1, 2).reshape(B, stvit.CELLS, rows, columns))
            parts = pixels.transpose(-1, -2) @ affinity  # (B, cells, C, 9)
            parts = parts.permute(0, 2, 3, 1).reshape(B * C, stvit.CELLS, rows, columns)
            super_tokens = folded(parts).reshape(B, C, rows, columns) / (count + stvit.EPS)
        out = unfolded(self.stoken_refine(super_tokens)) @ affinity.transpose(-1, -2)  # (B, cells, C, pixels of one)
        out = out.reshape(B, rows, columns, C, side, side).permute(0, 3, 1, 4, 2, 5)
        return out.reshape(x.shape)[:, :, :H, :W]


def multihead(attention: nn.Module, x):
    """A timm Attention of tokens (B, N, C) as PyTorch's nn.MultiheadAttention, which the authors use."""
    dim, device = attention.qkv.in_features, 'meta'  # its own weights are never there
    module = nn.MultiheadAttention(dim, attention.num_heads, batch_first=True, device=device)
    module.in_proj_weight, module.in_proj_bias = attention.qkv.weight, attention.qkv.bias
    module.out_proj = attention.proj
    return module.train(attention.training)(x, x, x, need_weights=False)[0]


class GLMix(glnet.GLMix):
    """Slots and pixels normalized as vectors; both softmaxes of the scores; the convolutions all of maps."""

    def forward(self, x, block_input):
        B, H, W, C = x.shape
        maps = x.permute(0, 3, 1, 2)
        if self.init_slots is None:
            slots = F.adaptive_avg_pool2d(block_input.permute(0, 3, 1, 2), glnet.SLOTS).flatten(2).transpose(1, 2)
        else:
            slots = self.init_slots.expand(B, -1, -1)
        tokens = maps.flatten(2).transpose(1, 2)
        slots, unit_tokens = (F.normalize(vectors, dim=-1, eps=glnet.NORM_EPS) for vectors in (slots, tokens))
        scores = slots @ (self.slot_scale * unit_tokens).transpose(1, 2)  # (B, slots, H * W)
        slots = multihead(self.attn, scores.softmax(-1) @ tokens)
        out = scores.transpose(1, 2).softmax(-1) @ slots
        out = out.transpose(1, 2).reshape(B, C, H, W)
        local = self.local
        for layer in (local.fc1, local.dwconv, local.fc2):
            groups = getattr(layer, 'groups', 1)
            weight = layer.weight if groups > 1 else layer.weight[:, :, None, None]
            maps = F.conv2d(maps, weight, layer.bias, padding=weight.shape[-1] // 2, groups=groups)
        return (out + maps).permute(0, 2, 3, 1)


class GlobalAttention(glnet.GlobalAttention):
    def forward(self, x, block_input):
        return multihead(self, x.flatten(1, 2)).reshape(x.shape)


FORMS = {
    stvit.SViT: {stvit.SuperTokenAttention: SuperTokenAttention, stvit.Attention: PixelAttention},
    glnet.GLNet: {glnet.GLMix: GLMix, glnet.GlobalAttention: GlobalAttention},
}
