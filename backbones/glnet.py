"""GLNet: Revisiting the Integration of Convolution and Attention for Vision Backbone (GLMix, arXiv 2411.14429).

Convolutions look at the map closely while attention looks at a few slots: pixels are softly clustered into the slots,
which attend to each other and are given back to the pixels.

Original code: rayleizhu/GLMix (MIT).
"""

import torch
from timm.layers import (
    Attention,
    ClassifierHead,
    DropPath,
    LayerScale,
    Mlp,
    calculate_drop_path_rates,
)
from timm.models import register_notrace_module
from torch import nn
from torch.nn import functional as F

from .checkpoints import as_linear, checkpoint_filter_fn
from .layers import BatchNorm, ConvMlp, PaddedConv2d, apply_nchw
from .pyramid import Pyramid
from .registration import variants

__all__ = ['GLNet', 'TokenLabelGLNet', 'checkpoint_filter_fn']

HEAD_DIM = 32
SLOTS = 8  # a side of the grid that the slots begin as
LAYER_NORM_EPS = 1e-6
NORM_EPS = 1e-12  # least norm that a vector is divided by
AUX_WEIGHT = 0.5  # of the logits of single pixels
MIXERS = {  # of a stage -> whether its even and its odd blocks attend
    'glmix': (False, False),
    'alternate': (False, True),
    'attention': (True, True),
}
# The authors' keys of patches, which are sequences without names.
CONVOLUTION_KEYS = [
    (r'^(downsample_layers\.0)\.1\.', r'\1.conv1.'),
    (r'^(downsample_layers\.0)\.2\.', r'\1.norm1.'),
    (r'^(downsample_layers\.0)\.4\.', r'\1.conv2.'),
    (r'^(downsample_layers\.0)\.5\.', r'\1.norm2.'),
    (r'^(downsample_layers\.[123])\.0\.', r'\1.proj.'),
    (r'^(downsample_layers\.[123])\.1\.', r'\1.norm.'),
]
PATCH_KEYS = [
    (r'^(downsample_layers\.0)\.0\.', r'\1.conv1.'),
    (r'^(downsample_layers\.0)\.1\.', r'\1.norm1.'),
    (r'^(downsample_layers\.[123])\.0\.', r'\1.norm.'),
    (r'^(downsample_layers\.[123])\.1\.', r'\1.proj.'),
]


class LocalConv(nn.Module):
    """A depthwise 5x5 convolution between two linears. (B, H, W, C) -> same."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.fc1 = nn.Linear(dim, dim, **dd)
        self.dwconv = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **dd)
        self.fc2 = nn.Linear(dim, dim, **dd)

    def forward(self, x):
        return self.fc2(apply_nchw(self.dwconv, self.fc1(x)))


@register_notrace_module
class GLMix(nn.Module):
    """Local convolutions, and global attention among slots, side by side.

    Slots begin as the means of an 8x8 grid of the block's input, which `forward` takes second, or as parameters.
    (B, H, W, C) -> same.
    """

    def __init__(self, dim: int, learn_slots: bool = False, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.init_slots = nn.Parameter(torch.empty(1, SLOTS**2, dim, **dd)) if learn_slots else None
        self.slot_scale = nn.Parameter(torch.empty((), **dd))
        self.attn = Attention(dim, dim // HEAD_DIM, qkv_bias=True, **dd)
        self.local = LocalConv(dim, **dd)
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.constant_(self.slot_scale, self.attn.qkv.in_features**-0.5)
        if self.init_slots is not None:
            nn.init.normal_(self.init_slots, std=0.02)

    def forward(self, x, block_input):
        if self.init_slots is None:
            slots = F.adaptive_avg_pool2d(block_input.permute(0, 3, 1, 2), SLOTS).flatten(2).mT
        else:
            slots = self.init_slots.expand(len(x), -1, -1)
        tokens = x.flatten(1, 2)
        slots = F.normalize(slots, dim=-1, eps=NORM_EPS) * self.slot_scale
        norms = torch.linalg.vector_norm(tokens, dim=-1).clamp_min(NORM_EPS)
        scores = slots @ tokens.mT / norms[:, None]  # cosines, scaled: (B, slots, H * W)
        slots = self.attn(scores.softmax(-1) @ tokens)
        shared = scores.softmax(1).mT @ slots
        return shared.unflatten(1, x.shape[1:3]) + self.local(x)


@register_notrace_module
class GlobalAttention(Attention):
    """Multi-head self-attention of all pixels. (B, H, W, C) -> same; the block's input does not matter."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__(dim, dim // HEAD_DIM, qkv_bias=True, device=device, dtype=dtype)

    def forward(self, x, block_input):
        return super().forward(x.flatten(1, 2)).unflatten(1, x.shape[1:3])


class Block(nn.Module):
    """Pre-norm block of GLMix or, if it `attends`, global attention, and a perceptron. (B, H, W, C) -> same.

    If it `convolves`, a depthwise convolution tells the positions before, and another is in the perceptron.
    """

    def __init__(
        self,
        dim: int,
        attends: bool,
        mlp_ratio: float,
        convolves: bool = True,
        learn_slots: bool = False,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        hidden_dim = int(dim * mlp_ratio)
        self.pos_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd) if convolves else None
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS, **dd)
        self.mixer = GlobalAttention(dim, **dd) if attends else GLMix(dim, learn_slots, **dd)
        self.ls1 = LayerScale(dim, layer_scale, **dd) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS, **dd)
        self.mlp = ConvMlp(dim, hidden_dim, residual=True, **dd) if convolves else Mlp(dim, hidden_dim, **dd)
        self.ls2 = LayerScale(dim, layer_scale, **dd) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x):
        block_input = x
        if self.pos_conv is not None:
            x = x + apply_nchw(self.pos_conv, x)
        x = x + self.drop_path(self.ls1(self.mixer(self.norm1(x), block_input)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class Stem(nn.Module):
    """Two strided convolutions. (B, in_chans, H, W) -> (B, ceil(H / 4), ceil(W / 4), C)."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, 2, 1, **dd)
        self.norm1 = nn.BatchNorm2d(dim // 2, **dd)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, 2, 1, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)

    def forward(self, x):
        x = x.contiguous(memory_format=torch.channels_last)
        return self.norm2(self.conv2(self.act(self.norm1(self.conv1(x))))).permute(0, 2, 3, 1)


class PatchStem(nn.Module):
    """Patches of 4x4 pixels. (B, in_chans, H, W) -> (B, ceil(H / 4), ceil(W / 4), C)."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.conv1 = PaddedConv2d(in_chans, dim, 4, 4, **dd)
        self.norm1 = nn.BatchNorm2d(dim, **dd)

    def forward(self, x):
        x = x.contiguous(memory_format=torch.channels_last)
        return self.norm1(self.conv1(x)).permute(0, 2, 3, 1)


class Downsample(nn.Module):
    """A convolution of 3x3 pixels and a norm, or, without `overlaps`, a norm and one of 2x2 pixels.

    (B, H, W, in_dim) -> (B, ceil(H / 2), ceil(W / 2), dim).
    """

    def __init__(self, in_dim: int, dim: int, overlaps: bool, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.overlaps = overlaps
        self.proj = nn.Conv2d(in_dim, dim, 3, 2, 1, **dd) if overlaps else PaddedConv2d(in_dim, dim, 2, 2, **dd)
        self.norm = nn.BatchNorm2d(dim if overlaps else in_dim, **dd)

    def forward(self, x):
        x = x.permute(0, 3, 1, 2)
        x = self.norm(self.proj(x)) if self.overlaps else self.proj(self.norm(x))
        return x.permute(0, 2, 3, 1)


class GLNet(Pyramid):
    """GLNet.

    Args:
        dims, depths: channels, multiples of 32, and blocks of each stage.
        mlp_ratio: expansion of the MLPs.
        mixers: of each stage: 'glmix', 'attention', or 'alternate' from GLMix to attention and back.
        convolves: overlapping patches, and depthwise convolutions for positions and in the MLPs, in the whole model.
        learn_slots: slots begin as parameters instead of as means of the map.
        layer_scale: initial value of the layer scales; none if None.
        drop_path_rate: stochastic depth, rising linearly over all blocks.
        base: in_chans, num_classes, global_pool and drop_rate, as for every `Pyramid`.
    """

    output_fmt = 'NHWC'
    first_conv = 'stages.0.downsample.conv1'
    official_keys = [
        (r'^downsample_layers\.(\d)\.', r'stages.\1.downsample.'),
        (r'(\.blocks\.\d+)\.(slot_scale|init_slots)$', r'\1.mixer.\2'),
        (r'\.relation_mha\.', '.mixer.attn.'),
        (r'\.mha_op\.', '.mixer.'),
        (r'\.in_proj_', '.qkv.'),
        (r'\.out_proj\.', '.proj.'),
        (r'\.feature_conv\.', '.mixer.local.'),
        (r'\.(local|mlp)\.0\.', r'.\1.fc1.'),
        (r'\.(local|mlp)\.1\.', r'.\1.dwconv.'),
        (r'\.(local|mlp)\.[23]\.', r'.\1.fc2.'),
        (r'^tklb_aux_head\.', 'head.aux_fc.'),
    ]

    def __init__(
        self,
        dims=(64, 128, 256, 512),
        depths=(4, 4, 18, 4),
        mlp_ratio: float = 3.0,
        mixers=('glmix', 'glmix', 'alternate', 'attention'),
        convolves: bool = True,
        learn_slots: bool = False,
        layer_scale: float | None = None,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
        **base,
    ):
        if any(dim % HEAD_DIM for dim in dims):
            raise ValueError(f'dims must be multiples of {HEAD_DIM}, the width of a head, got {dims}.')
        if any(mixer not in MIXERS for mixer in mixers):
            raise ValueError(f'mixers must be of {", ".join(MIXERS)}, got {mixers}.')
        super().__init__(device=device, dtype=dtype, **base)
        dd = {'device': device, 'dtype': dtype}
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        stem = Stem if convolves else PatchStem
        self.official_keys = [*(CONVOLUTION_KEYS if convolves else PATCH_KEYS), *self.official_keys]
        for i, dim in enumerate(dims):
            attends = MIXERS[mixers[i]]
            self.add_stage(
                Downsample(dims[i - 1], dim, convolves, **dd) if i else stem(self.in_chans, dim, **dd),
                [
                    Block(dim, attends[j % 2], mlp_ratio, convolves, learn_slots, layer_scale, rate, **dd)
                    for j, rate in enumerate(rates[i])
                ],
                num_chs=dim,
                stride=2 if i else 4,
            )
        self.finish(BatchNorm(dims[-1], **dd))

    @staticmethod
    def init_module(module):
        """Linears truncated normal, but what the authors have as convolutions stays as PyTorch initialises these."""
        Pyramid.init_module(module)
        if isinstance(module, Attention):
            nn.init.xavier_uniform_(module.qkv.weight)
        elif isinstance(module, LocalConv | ConvMlp):
            module.fc1.reset_parameters()
            module.fc2.reset_parameters()
        elif isinstance(module, Block) and isinstance(module.mixer, GLMix):
            module.mlp.fc1.reset_parameters()
            module.mlp.fc2.reset_parameters()

    def map_official(self, state_dict) -> dict[str, torch.Tensor]:
        """The authors' state dict under our keys; 1x1 convolutions become linears, (1, C, 1, 1) scales vectors."""
        mapped = {key: as_linear(value) for key, value in super().map_official(state_dict).items()}
        return {key: value.flatten() if key.endswith('.gamma') else value for key, value in mapped.items()}


class TokenLabelHead(ClassifierHead):
    """Pooling and a classifier, and a second classifier of each pixel, whose greatest logits are added by half."""

    def __init__(self, *args, device=None, dtype=None, **kwargs):
        super().__init__(*args, device=device, dtype=dtype, **kwargs)
        self.aux_fc = self._make_aux_fc(device, dtype)

    def _make_aux_fc(self, device=None, dtype=None) -> nn.Module:
        if isinstance(self.fc, nn.Identity):
            return nn.Identity().train(self.training)
        fc = nn.Linear(self.in_features, self.fc.out_features, device=device, dtype=dtype)
        return fc.train(self.training)

    def reset(self, *args, device=None, dtype=None, **kwargs) -> None:
        super().reset(*args, device=device, dtype=dtype, **kwargs)
        self.aux_fc = self._make_aux_fc(device, dtype)

    def forward(self, x, pre_logits: bool = False):
        logits = super().forward(x, pre_logits)
        if pre_logits or isinstance(self.fc, nn.Identity):
            return logits
        return logits + AUX_WEIGHT * self.aux_fc(x).flatten(1, 2).amax(1)


class TokenLabelGLNet(GLNet):
    """GLNet with a second classifier, trained on a label for each pixel. Arguments are those of GLNet."""

    classifier_name = ('head.fc', 'head.aux_fc')

    @torch.jit.ignore
    def make_head(self, in_features: int, num_classes: int, pool_type: str, drop_rate: float, device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        return TokenLabelHead(in_features, num_classes, pool_type, drop_rate, input_fmt=self.output_fmt, **dd)

    @torch.jit.ignore
    def get_classifier(self):
        return self.head.fc, self.head.aux_fc


large = dict(dims=(96, 192, 384, 768))
swin_like = dict(
    large,
    depths=(2, 2, 6, 2),
    mlp_ratio=4.0,
    mixers=('glmix', 'glmix', 'glmix', 'attention'),
    convolves=False,
    drop_path_rate=0.1,
)

variants(
    GLNet,
    glnet_4g=dict(drop_path_rate=0.15),
    glnet_9g=dict(large, drop_path_rate=0.3),
    glnet_16g=dict(dims=(128, 256, 512, 1024), layer_scale=1e-4, drop_path_rate=0.4),
    glnet_stl=swin_like,
    glnet_stl_paramslot=dict(swin_like, learn_slots=True),
)
variants(
    TokenLabelGLNet,
    glnet_4g_tklb=dict(drop_path_rate=0.1),
    glnet_9g_tklb=dict(large, drop_path_rate=0.1),
)
