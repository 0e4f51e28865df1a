"""Windows cut out of maps: LITv2's HiLo and VSA."""

import torch
from torch.nn import functional as F

from zoo.backbones import litv2, vsa
from zoo.backbones.layers import pad_to_stride

from .explicit import attend, merged, split

__all__ = ['FORMS']


class HiLo(litv2.HiLo):
    """Windows permuted to be a batch, and scores of every pixel for every mean."""

    def high(self, x):
        B, H, W, C = x.shape
        side = self.window_size
        rows, columns = H // side, W // side
        x = x.reshape(B, rows, side, columns, side, C).transpose(2, 3).reshape(B, rows * columns, side * side, C)
        qkv = self.h_qkv(x).reshape(B, rows * columns, side * side, 3, self.h_heads, -1)
        query, key, value = qkv.permute(3, 0, 1, 4, 2, 5)  # (B, windows, heads, pixels, head_dim)
        out = attend(query, key, value).transpose(2, 3).reshape(B, rows, columns, side, side, -1)
        return self.h_proj(out.transpose(2, 3).reshape(B, H, W, -1))

    def low(self, x):
        B, H, W, C = x.shape
        (query,) = split(self.l_q(x).reshape(B, H * W, -1), 1, self.l_heads)
        if self.window_size > 1:
            pooled = F.avg_pool2d(x.permute(0, 3, 1, 2), self.window_size)
            pooled = pooled.reshape(B, C, -1).permute(0, 2, 1)
        else:
            pooled = x.reshape(B, H * W, C)
        key, value = split(self.l_kv(pooled), 2, self.l_heads)
        return self.l_proj(merged(attend(query, key, value)).reshape(B, H, W, -1))


class VariedSizeWindowAttention(vsa.VariedSizeWindowAttention):
    """Maps in planes of channels; the coordinates of every pixel made of tensors of their size; windows permuted."""

    def forward(self, x):
        B, H, W, _ = x.shape
        side, heads = self.window_size, self.num_heads
        x = x.permute(0, 3, 1, 2)
        padded = pad_to_stride(x, (side, side))
        rows, columns = padded.shape[2] // side, padded.shape[3] // side
        points = self.points(padded, (H, W))

        qkv = self.pointwise(self.qkv, x).reshape(B, 3, heads, -1, H, W).transpose(0, 1)
        qkv = qkv.reshape(3 * B * heads, -1, H, W)
        query, key, value = pad_to_stride(qkv, (side, side)).reshape(3, B * heads, -1, rows * side, columns * side)
        key, value = (F.grid_sample(maps, points, align_corners=True) for maps in (key, value))

        def partitioned(maps):
            maps = maps.reshape(B, heads, -1, rows, side, columns, side).permute(0, 3, 5, 1, 4, 6, 2)
            return maps.reshape(B * rows * columns, heads, side * side, -1)

        windows = (partitioned(maps) for maps in (query, key, value))
        out = attend(*windows, self.scale, self.position_bias())
        out = out.reshape(B, rows, columns, heads, side, side, -1).permute(0, 3, 6, 1, 4, 2, 5)
        out = out.reshape(B, -1, rows * side, columns * side)[:, :, :H, :W]
        return self.pointwise(self.proj, out).permute(0, 2, 3, 1)

    def points(self, padded, size):
        """(B * heads, rows, columns, 2) of a padded map (B, C, rows, columns), of `size` before."""
        side, heads = self.window_size, self.num_heads
        means = F.leaky_relu(F.avg_pool2d(padded, side))
        offsets, scales = (
            self.pointwise(linear, means).reshape(len(means) * heads, 2, *means.shape[2:])
            for linear in (self.sampling_offsets, self.sampling_scales)
        )
        whole = [max(1, length // side) for length in (size[1], size[0])]  # windows, as the offsets count them
        offsets = torch.stack([offsets[:, i] / whole[i] for i in range(2)], dim=1)

        def axis(length):
            position = torch.linspace(-1, 1, length, dtype=padded.dtype, device=padded.device).reshape(-1, side)
            center = position.mean(1, keepdim=True)
            return center, position - center

        (y, y_inside), (x, x_inside) = (axis(length) for length in padded.shape[2:])
        centers = torch.stack(torch.broadcast_tensors(x, y[:, :, None, None]))
        inside = torch.stack(torch.broadcast_tensors(x_inside, y_inside[:, :, None, None]))
        scales, offsets = (each[:, :, :, None, :, None] for each in (1 + scales, offsets))
        points = centers + inside * scales + offsets  # (B * heads, 2, rows, side, columns, side)
        return points.permute(0, 2, 3, 4, 5, 1).reshape(len(points), *padded.shape[2:], 2)

    @staticmethod
    def pointwise(linear, x):
        """A linear as a 1x1 convolution of maps (B, C, H, W)."""
        return F.conv2d(x, linear.weight[:, :, None, None], linear.bias)


FORMS = {
    litv2.LITv2: {litv2.HiLo: HiLo},
    vsa.ViTAEv2VSA: {vsa.VariedSizeWindowAttention: VariedSizeWindowAttention},
}
