"""Hierarchical SpectFormer: Frequency and Attention is what you need in a Vision Transformer (arXiv 2304.06446).

After Wave-ViT: two stages gate the spectrum of their maps by learned filters, two attend globally, and a class token
attends to the last map.

Original code: badripatro/SpectFormers (without a licence).
"""

import re
from functools import partial

import torch
from timm.layers import calculate_drop_path_rates, to_2tuple
from timm.models._input import update_model_input_size
from timm.models.volo import ClassBlock
from torch import nn

from .checkpoints import PVT_KEYS, checkpoint_filter_fn
from .layers import ConvMlp, Downsample, PatchEmbed, PreNormBlock
from .pyramid import Pyramid, init_conv_and_linear
from .registration import variants
from .spectformer import GlobalAttention, SpectralGating, fit_filters

__all__ = ['HierarchicalSpectFormer', 'TokenLabelSpectFormer', 'checkpoint_filter_fn']

AUX_WEIGHT = 0.5  # of the logits of single tokens

LayerNorm = partial(nn.LayerNorm, eps=1e-6)  # outside the patch embeddings


class HierarchicalBlock(PreNormBlock):
    """Pre-norm block of spectral gating or attention, and a convolutional perceptron. (B, H, W, C) -> same."""

    def __init__(self, dim: int, mixer: nn.Module, mlp_ratio: float, drop_path: float = 0.0, device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__(dim, mixer, ConvMlp(dim, int(dim * mlp_ratio), **dd), drop_path, LayerNorm, **dd)


class Stem(PatchEmbed):
    """Three convolutions, the first one strided, and patches. (B, in, H, W) -> (B, ceil(H / 4), ceil(W / 4), out)."""

    def __init__(self, in_chans: int, hidden_dim: int, dim: int, device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__(nn.Conv2d(hidden_dim, dim, 3, 2, 1, **dd), dim, **dd)
        layers = []
        for width, size, stride in ((in_chans, 7, 2), (hidden_dim, 3, 1), (hidden_dim, 3, 1)):
            conv = nn.Conv2d(width, hidden_dim, size, stride, size // 2, bias=False, **dd)
            layers += [conv, nn.BatchNorm2d(hidden_dim, **dd), nn.ReLU()]
        self.conv = nn.Sequential(*layers)

    def forward(self, x):
        return super().forward(self.conv(x.contiguous(memory_format=torch.channels_last)))


class ClassTokenHead(nn.Module):
    """A class token, at first the mean of the tokens, attends to them and is classified. (B, H, W, C) -> logits.

    Args:
        in_features, num_heads, mlp_ratio: of the map, and of the class attention.
        num_classes: width of the classifier; none if 0.
        pool_type: 'token', or '' for no class token: then each pixel is normed and classified.
        drop_rate: dropout before the classifier.
        token_label: whether a second classifier, of each token, adds its greatest logits by half.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        mlp_ratio: float,
        num_classes: int,
        pool_type: str = 'token',
        drop_rate: float = 0.0,
        token_label: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.class_block = ClassBlock(
            in_features, num_heads, mlp_ratio=mlp_ratio, qkv_bias=True, norm_layer=LayerNorm, **dd
        )
        self.norm = LayerNorm(in_features, **dd)
        self.drop = nn.Dropout(drop_rate)
        self.token_label = token_label
        self.reset(num_classes, pool_type, in_features=in_features, **dd)

    def reset(
        self,
        num_classes: int,
        pool_type: str | None = None,
        reset_other: bool = False,
        in_features: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        """New classifiers, by default with the pooling there is; `reset_other` takes class attention and norm away."""
        if pool_type not in (None, 'token', ''):
            raise ValueError(f"global_pool must be 'token', or '' for none, got {pool_type!r}.")
        if pool_type is not None:
            self.pool_type = pool_type
        if reset_other:
            self.class_block, self.norm = nn.Identity(), nn.Identity()
        self.num_features = in_features or self.num_features

        def classifier():
            if not num_classes:
                return nn.Identity().train(self.training)
            return nn.Linear(self.num_features, num_classes, device=device, dtype=dtype).train(self.training)

        self.fc = classifier()
        if self.token_label:
            self.aux_fc = classifier()

    def forward(self, x, pre_logits: bool = False):
        if not self.pool_type:
            x = self.drop(self.norm(x))
            return x if pre_logits else self.fc(x)
        x = x.flatten(1, 2)
        x = self.norm(self.class_block(torch.cat((x.mean(1, keepdim=True), x), dim=1)))
        class_token = self.drop(x[:, 0])
        if pre_logits or isinstance(self.fc, nn.Identity):
            return class_token
        logits = self.fc(class_token)
        return logits + AUX_WEIGHT * self.aux_fc(x[:, 1:]).amax(1) if self.token_label else logits


class HierarchicalSpectFormer(Pyramid):
    """Hierarchical SpectFormer.

    Args:
        img_size: side, or height and width, of the images that the filters are made for.
        dims, depths, mlp_ratios: channels, blocks and expansion of each stage.
        num_heads: of the attention in each stage; a stage of spectral gating has 0.
        stem_dim: channels of the stem's first convolutions.
        drop_path_rate: stochastic depth, rising linearly over all blocks.
        global_pool: 'token', or '' for none.
        base: in_chans, num_classes and drop_rate, as for every `Pyramid`.
    """

    output_fmt = 'NHWC'
    first_conv = 'stages.0.downsample.conv.0'
    init_module = staticmethod(init_conv_and_linear)
    official_keys = [
        (r'^norm4\.', 'head.norm.'),
        *PVT_KEYS,
        (r'^post_network\.0\.', 'head.class_block.'),
        (r'^aux_head\.', 'head.aux_fc.'),
    ]
    token_label = False

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        dims=(64, 128, 320, 448),
        depths=(3, 4, 6, 3),
        num_heads=(0, 0, 10, 14),
        mlp_ratios=(8, 8, 4, 4),
        stem_dim: int = 32,
        drop_path_rate: float = 0.0,
        global_pool: str = 'token',
        device=None,
        dtype=None,
        **base,
    ):
        super().__init__(global_pool=global_pool, device=device, dtype=dtype, **base)
        dd = {'device': device, 'dtype': dtype}
        self._head_args |= {'num_heads': num_heads[-1], 'mlp_ratio': mlp_ratios[-1]}
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        for i, dim in enumerate(dims):
            size = map_size(img_size, i)

            def mixer(dim=dim, heads=num_heads[i], size=size):
                return GlobalAttention(dim, heads, qkv_bias=True, **dd) if heads else SpectralGating(dim, size, **dd)

            self.add_stage(
                Downsample(nn.Conv2d(dims[i - 1], dim, 3, 2, 1, **dd), dim, **dd)
                if i
                else Stem(self.in_chans, stem_dim, dim, **dd),
                [HierarchicalBlock(dim, mixer(), mlp_ratios[i], rate, **dd) for rate in rates[i]],
                num_chs=dim,
                stride=2 if i else 4,
                norm=LayerNorm(dim, **dd) if i < len(dims) - 1 else None,
            )
        self.finish()

    @torch.jit.ignore
    def make_head(self, in_features: int, num_classes: int, **arguments):
        return ClassTokenHead(in_features, num_classes=num_classes, token_label=self.token_label, **arguments)

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resample the filters for images of another size."""
        for i, stage in enumerate(self.stages):
            for module in stage.modules():
                if isinstance(module, SpectralGating):
                    module.set_size(map_size(img_size, i))
        update_model_input_size(self, img_size)

    def map_official(self, state_dict) -> dict[str, torch.Tensor]:
        """The authors' state dict under our keys, filters for the model's size, q and kv joined; ours as it is."""
        mapped = fit_filters(super().map_official(state_dict), self)
        for key in [*mapped]:
            match = re.fullmatch(r'(stages\.\d+\.blocks\.\d+\.attn\.)q(\.weight|\.bias)', key)
            other = match and f'{match[1]}kv{match[2]}'
            if match and other in mapped and mapped[other].shape[1:] == mapped[key].shape[1:]:
                mapped[f'{match[1]}qkv{match[2]}'] = torch.cat((mapped.pop(key), mapped.pop(other)))
        return mapped


def map_size(img_size: int | tuple[int, int], stage: int) -> tuple[int, int]:
    """Rows and columns of the maps of a stage."""
    return tuple(-(-side // (4 * 2**stage)) for side in to_2tuple(img_size))


class TokenLabelSpectFormer(HierarchicalSpectFormer):
    """Hierarchical SpectFormer with a second classifier, trained on a label for each token of the last map."""

    classifier_name = ('head.fc', 'head.aux_fc')
    token_label = True

    @torch.jit.ignore
    def get_classifier(self):
        return self.head.fc, self.head.aux_fc


small = dict(drop_path_rate=0.1)
base = dict(dims=(64, 128, 320, 512), depths=(3, 4, 12, 3), num_heads=(0, 0, 10, 16), stem_dim=64, drop_path_rate=0.1)
large = dict(dims=(96, 192, 384, 512), depths=(3, 6, 18, 3), num_heads=(0, 0, 12, 16), stem_dim=64, drop_path_rate=0.3)

variants(TokenLabelSpectFormer, spectformer_h_s=small, spectformer_h_b=base, spectformer_h_l=large)
variants(
    HierarchicalSpectFormer,
    spectformer_h_s_notoken=small,
    spectformer_h_b_notoken=base,
    spectformer_h_l_notoken=large,
)
