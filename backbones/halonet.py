"""HaloNet: Scaling Local Self-Attention for Parameter Efficient Visual Backbones (arXiv 2103.12731).

A map is cut into blocks; the pixels of a block attend to the block and a halo of pixels around it. The paper's H0 to H7
follow its table 3; their authors published neither code nor weights, so these models are held against timm's halo
attention where timm can express them. timm owns `halonet_h1`, with eight heads in every stage.

timm's own hybrids, which have weights, refuse images whose maps don't divide into blocks; under `NAME_dynamic` they
take every size, and compute what timm's do where timm's run.
"""

import dataclasses

import torch
from timm.layers import BatchNormAct2d, ConvNormAct, DropPath, calculate_drop_path_rates, create_act_layer
from timm.layers.halo_attn import HaloAttn
from timm.models import register_notrace_module
from timm.models.byoanet import model_cfgs
from timm.models.byobnet import ByobNet
from torch import nn
from torch.nn import functional as F

from .checkpoints import checkpoint_filter_fn
from .pyramid import ImageChecks, Pyramid
from .registration import variants

__all__ = ['DynamicHaloNet', 'HaloNet', 'checkpoint_filter_fn']


@register_notrace_module
class HaloAttention(HaloAttn):
    """timm's halo attention on maps of any size. (B, C, H, W) -> (B, dim_out, ceil(H / stride), ceil(W / stride)).

    Beyond the map lie pixels with keys and values of zero, which take part in the softmax: this is what timm's halos
    find at a border, and it holds here too for the rest of a block that the map ends in.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if isinstance(self.pool, nn.AvgPool2d):
            self.pool = nn.AvgPool2d(2, 2, ceil_mode=True)

    def forward(self, x):
        batch, _, height, width = x.shape
        size, halo, window, strided = self.block_size, self.halo_size, self.win_size, self.block_size_ds
        rows, columns = -(-height // size), -(-width // size)  # of blocks
        q = self.q(x)  # (B, heads * qk, ceil(H / stride), ceil(W / stride))
        out_height, out_width = q.shape[2:]
        q = F.pad(q, (0, columns * strided - out_width, 0, rows * strided - out_height))
        q = q.reshape(batch * self.num_heads, self.dim_head_qk, rows, strided, columns, strided)
        q = q.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)  # (B * heads, blocks, pixels, qk)
        kv = F.pad(self.kv(x), (halo, halo + columns * size - width, halo, halo + rows * size - height))
        kv = kv.unfold(2, window, size).unfold(3, window, size)  # (B, heads * (qk + v), rows, columns, window, window)
        kv = kv.reshape(batch * self.num_heads, self.dim_head_qk + self.dim_head_v, rows * columns, window * window)
        k, v = kv.permute(0, 2, 3, 1).split((self.dim_head_qk, self.dim_head_v), dim=-1)

        scores = q @ k.mT  # (B * heads, blocks, pixels, window^2)
        position = self.pos_embed(q)
        attn = (scores + position) * self.scale if self.scale_pos_embed else scores * self.scale + position
        x = (attn.softmax(dim=-1) @ v).unflatten(2, (strided, strided)).unflatten(1, (rows, columns))
        x = x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B * heads, v, H, W), padded
        return self.pool(x.unflatten(0, (batch, self.num_heads)).flatten(1, 2)[..., :out_height, :out_width])


class Block(nn.Module):
    """A bottleneck whose spatial layer is halo attention, with no projection behind it. (B, C, H, W) -> (B, C', ...).

    Queries, keys and the block's inside have `dim` channels, values `value_ratio` times as many; the first block of a
    stage may change the number of channels and take every second query (`stride`).
    """

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        dim: int,
        value_dim: int,
        num_heads: int,
        block_size: int,
        halo_size: int,
        stride: int = 1,
        act_layer: str = 'relu',
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.conv1_1x1 = ConvNormAct(in_chans, dim, act_layer=act_layer, **dd)
        self.self_attn = HaloAttention(
            dim,
            value_dim,
            stride=stride,
            num_heads=num_heads,
            dim_head=dim // num_heads,
            block_size=block_size,
            halo_size=halo_size,
            **dd,
        )
        self.post_attn = BatchNormAct2d(value_dim, act_layer=act_layer, **dd)
        self.conv3_1x1 = ConvNormAct(value_dim, out_chans, apply_act=False, **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        if stride > 1 or in_chans != out_chans:
            self.shortcut = ConvNormAct(in_chans, out_chans, stride=stride, apply_act=False, **dd)
        else:
            self.shortcut = nn.Identity()
        self.act = create_act_layer(act_layer)

    def forward(self, x):
        y = self.conv3_1x1(self.post_attn(self.self_attn(self.conv1_1x1(x))))
        return self.act(self.drop_path(y) + self.shortcut(x))


class HaloNet(Pyramid):
    """HaloNet.

    Args:
        depths: blocks of each stage (l).
        block_size, halo_size: pixels along a block's side (b) and of the halo around it (h).
        value_ratio: channels of the values over those of the queries (r_v).
        block_ratio: channels of a stage's map over those of the queries (r_b).
        final_dim: channels of a convolution after the last stage (d_f); no such convolution if 0.
        dims, num_heads: channels of the queries, and heads, of each stage.
        act_layer: activation, by timm's name; the paper names none, timm has 'relu'.
        drop_path_rate: stochastic depth, rising linearly over all blocks.
        base: in_chans, num_classes, global_pool and drop_rate, as for every `Pyramid`.
    """

    first_conv = 'stem.conv'
    out_indices = (0, 1, 2, 3, 4)
    official_keys = [  # timm's halonet_h1
        (r'^stem\.conv1\.', 'stem.'),
        (r'^stages\.(\d)\.(\d+)\.', r'stages.\1.blocks.\2.'),
    ]

    def __init__(
        self,
        depths=(3, 3, 7, 3),
        block_size: int = 8,
        halo_size: int = 3,
        value_ratio: float = 1.0,
        block_ratio: float = 0.5,
        final_dim: int = 0,
        dims=(64, 128, 256, 512),
        num_heads=(4, 8, 8, 8),
        act_layer: str = 'relu',
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
        **base,
    ):
        if block_size < 1 or halo_size < 0:
            raise ValueError(f'Expected block_size >= 1 and halo_size >= 0, got {block_size} and {halo_size}.')
        super().__init__(device=device, dtype=dtype, **base)
        dd = {'device': device, 'dtype': dtype}
        stem = ConvNormAct(self.in_chans, dims[0], 7, stride=2, act_layer=act_layer, **dd)
        self.add_stem(stem, num_chs=dims[0], stride=2)
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        width = dims[0]
        for i, (dim, heads) in enumerate(zip(dims, num_heads, strict=True)):
            value_dim, out_chans = int(dim * value_ratio), int(dim * block_ratio)
            if dim % heads or value_dim % heads:
                raise ValueError(f'{heads} heads of stage {i} must divide queries ({dim}) and values ({value_dim}).')
            blocks = []
            for j, rate in enumerate(rates[i]):
                stride = 2 if i and not j else 1
                blocks.append(
                    Block(
                        width,
                        out_chans,
                        dim,
                        value_dim,
                        heads,
                        block_size,
                        halo_size,
                        stride=stride,
                        act_layer=act_layer,
                        drop_path=rate,
                        **dd,
                    )
                )
                width = out_chans
            is_widened = final_dim and i == len(dims) - 1
            self.add_stage(
                nn.Identity() if i else nn.MaxPool2d(3, stride=2, padding=1),
                blocks,
                num_chs=final_dim if is_widened else out_chans,
                stride=2,
                norm=ConvNormAct(out_chans, final_dim, act_layer=act_layer, **dd) if is_widened else None,
            )
        self.finish()

    @staticmethod
    def init_module(module: nn.Module) -> None:
        """As timm's ByobNet: convolutions by their fan-out, and each block begins as its shortcut."""
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
        elif isinstance(module, HaloAttention):
            module.reset_parameters()
        elif isinstance(module, Block):
            nn.init.zeros_(module.conv3_1x1.bn.weight)


class DynamicHaloNet(ImageChecks, ByobNet):
    """timm's HaloNet hybrids on images of any size from 32x32; states and weights are timm's.

    Args:
        base: timm's name of the model.
        arguments: as for timm's ByobNet.
    """

    out_indices = (0, 1, 2, 3, 4)

    def __init__(self, base: str, **arguments):
        super().__init__(_with_halo_attention(model_cfgs[base]), **arguments)

    def map_official(self, state_dict) -> dict[str, torch.Tensor]:
        """timm's keys are this model's."""
        return dict(state_dict)


def _with_halo_attention(cfg):
    """timm's model or block configuration with our halo attention for timm's."""
    changes = {'self_attn_layer': HaloAttention} if cfg.self_attn_layer == 'halo' else {}
    if hasattr(cfg, 'blocks'):
        changes['blocks'] = tuple(
            tuple(map(_with_halo_attention, stage)) if isinstance(stage, tuple | list) else _with_halo_attention(stage)
            for stage in cfg.blocks
        )
    return dataclasses.replace(cfg, **changes)


variants(
    HaloNet,
    halonet_h0={},
    halonet_h2=dict(depths=(3, 3, 11, 3), block_ratio=1.25),
    halonet_h3=dict(depths=(3, 3, 12, 3), block_size=10, block_ratio=1.5, final_dim=1024),
    halonet_h4=dict(depths=(3, 3, 12, 3), block_size=12, halo_size=2, block_ratio=3, final_dim=1280),
    halonet_h5=dict(depths=(3, 3, 23, 3), block_size=14, halo_size=2, value_ratio=2.5, block_ratio=2, final_dim=1536),
    halonet_h6=dict(depths=(3, 3, 24, 3), halo_size=4, value_ratio=3, block_ratio=2.75, final_dim=1536),
    halonet_h7=dict(depths=(3, 3, 26, 3), block_size=10, value_ratio=4, block_ratio=3.5, final_dim=2048),
)
variants(
    DynamicHaloNet,
    **{
        f'{base}_dynamic': dict(base=base)
        for base in ('halonet26t', 'sehalonet33ts', 'halonet50ts', 'eca_halonext26ts', 'haloregnetz_b')
    },
)
