"""Spectral gating and global attention: SpectFormer."""

import torch

from zoo.backbones import spectformer, spectformer_h

from .explicit import attend, merged, split

__all__ = ['FORMS']


class SpectralGating(spectformer.SpectralGating):
    """Transforms, of unit norm, along the rows and columns of a channels-last map."""

    def forward(self, x):
        size = tuple(x.shape[1:3])
        weight = self.complex_weight.to(torch.promote_types(x.dtype, torch.float32))
        weight = torch.view_as_complex(weight)
        if size != self.size:  # which the authors' code refuses
            weight = spectformer.resampled(weight.permute(2, 0, 1), self.size, size).permute(1, 2, 0)
        spectrum = torch.fft.rfft2(x.to(weight.real.dtype), dim=(1, 2), norm='ortho') * weight
        return torch.fft.irfft2(spectrum, s=size, dim=(1, 2), norm='ortho').to(x.dtype)


class GlobalAttention(spectformer.GlobalAttention):
    def forward(self, x, attn_mask=None, is_causal=False):
        query, key, value = split(self.qkv(x.flatten(1, 2)), 3, self.num_heads)
        return self.proj(merged(attend(query, key, value))).reshape(x.shape)


_FORMS = {spectformer.SpectralGating: SpectralGating, spectformer.GlobalAttention: GlobalAttention}
FORMS = {spectformer.SpectFormer: _FORMS, spectformer_h.HierarchicalSpectFormer: _FORMS}
