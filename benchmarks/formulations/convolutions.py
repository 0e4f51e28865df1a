"""Mixers made of convolutions: SMT's modulation, OverLoCK's dynamic convolution, ECA-Net's gate."""

import torch
from timm.layers import EcaModule
from torch.nn import functional as F

from zoo.backbones import contmix, ecanet, overlock, smt
from zoo.kernels.neighborhood.reference import neighbors

from .explicit import attend, merged, split

__all__ = ['FORMS']


class ScaleAwareModulation(smt.ScaleAwareModulation):
    """The heads' maps are concatenated one after the other, each copying those before."""

    def forward(self, x):
        B, H, W, C = x.shape
        count = len(self.local_convs)
        heads = self.s(x).reshape(B, H, W, count, C // count).permute(3, 0, 4, 1, 2)
        scales = None
        for head, conv in zip(heads, self.local_convs, strict=True):
            scale = conv(head).reshape(B, C // count, 1, H, W)
            scales = scale if scales is None else torch.cat([scales, scale], dim=2)
        modulator = self.proj1(self.act(self.bn(self.proj0(scales.reshape(B, C, H, W)))))
        modulator = modulator.reshape(B, C, H * W).permute(0, 2, 1)
        return self.proj(modulator * self.v(x.reshape(B, H * W, C))).reshape(B, H, W, C)


class Attention(smt.Attention):
    """Scores as a tensor; the convolution of the values after their heads were split and merged."""

    def forward(self, x):
        B, H, W, C = x.shape
        x = x.reshape(B, H * W, C)
        (query,), (key, value) = split(self.q(x), 1, self.num_heads), split(self.kv(x), 2, self.num_heads)
        local = self.local_conv(merged(value).transpose(1, 2).reshape(B, C, H, W))
        local = local.reshape(B, C, H * W).transpose(1, 2)
        return self.proj(merged(attend(query, key, value)) + local).reshape(B, H, W, C)


class ContextMixing(contmix.ContextMixing):
    """Affinities to every cell are projected to taps, and neighborhoods are unfolded.

    The second product is neighborhood attention's by a library (natten) for GPUs alone in the authors' model; this is
    the form that they give for where it is missing.
    """

    def mix(self, value, x):
        B, _, H, W = value.shape
        x, guide = x.split(self.split, dim=1)
        query = self.weight_query(x) * self.scale
        key = self.weight_key(F.adaptive_avg_pool2d(guide, self.pooled_size))
        query, key = (each.reshape(B, self.num_heads, self.head_dim, -1) for each in (query, key))
        affinities = torch.einsum('bgcn,bgcl->bgnl', query, key)
        taps = self.weight_proj(affinities.permute(0, 3, 1, 2).contiguous())  # (B, taps, heads, H * W)
        taps = taps.permute(0, 2, 3, 1).reshape(B, self.num_heads, H, W, -1)
        parts = zip(
            taps.split([size**2 for size in self.kernel_sizes], dim=-1),
            (self.rpb1, self.rpb2),
            value.chunk(2, dim=1),
            self.kernel_sizes,
            strict=True,
        )
        return torch.cat([self.convolved(*part) for part in parts], dim=1)

    def convolved(self, scores, table, value, size):
        """Values (B, C, H, W) by kernels of scores (B, heads, H, W, size * size)."""
        B, _, H, W = value.shape
        rows, columns = (neighbors(length, size, 1, value.device)[1] for length in (H, W))
        index = rows[:, None, :, None] * (2 * size - 1) + columns[:, None, :]  # (H, W, size, size)
        bias = table.flatten(1)[:, index.flatten()].reshape(-1, H, W, size * size)
        weights = (scores + bias).softmax(-1)
        windows = F.unfold(value, size).reshape(B, -1, H - size + 1, W - size + 1)
        windows = F.pad(windows, (size // 2,) * 4, mode='replicate')  # border pixels have the windows nearest to them
        windows = windows.reshape(B, self.num_heads, self.head_dim, size * size, H, W)
        return torch.einsum('bghwk,bgckhw->bgchw', weights, windows).reshape(B, -1, H, W)


class EfficientChannelAttention(EcaModule):
    """Means pooled as a map, and turned twice for the convolution along the channels."""

    def forward(self, x):
        means = F.adaptive_avg_pool2d(x, 1)
        gate = self.conv(means.squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        return x * gate.sigmoid().expand_as(x)


FORMS = {
    smt.SMT: {smt.ScaleAwareModulation: ScaleAwareModulation, smt.Attention: Attention},
    overlock.OverLoCK: {contmix.ContextMixing: ContextMixing},
    ecanet.ECAResNet: {EcaModule: EfficientChannelAttention},
    ecanet.ECAMobileNetV2: {EcaModule: EfficientChannelAttention},
}
