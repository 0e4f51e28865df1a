"""MoH: Multi-Head Attention as Mixture-of-Head Attention (arXiv 2410.11842), on TransNeXt.

A router weighs the heads of each pixel: some are shared by all pixels, of the others only the best few count.
Original code: SkyworkAI/MoH, folder MoH-ViT (Apache-2.0).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from timm.models import register_notrace_module
from torch import nn

from .checkpoints import checkpoint_filter_fn
from .registration import variants
from .transnext import TransNeXt

__all__ = ['HeadRouter', 'MoHTransNeXt', 'checkpoint_filter_fn']


class Selection(nn.Module):
    """Keep each pixel's `count` greatest scores, and scale them to a sum of `count`. (..., heads) -> same."""

    def __init__(self, count: int):
        super().__init__()
        self.count = count

    def forward(self, scores):
        index = scores.topk(self.count, dim=-1).indices
        kept = torch.zeros_like(scores).scatter(-1, index, scores.gather(-1, index))
        return kept * (self.count / kept.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).eps))

    def extra_repr(self):
        return f'count={self.count}'


@register_notrace_module
class HeadRouter(nn.Module):
    """Weights of a pixel's heads, the shared ones first (section 3.2). (B, H, W, C) -> (B, H, W, heads).

    Args:
        dim: channels.
        num_heads: heads.
        shared_heads: those that every pixel uses.
        routed_heads: how many of the others a pixel uses; 0 where all are shared.
    """

    def __init__(self, dim: int, num_heads: int, shared_heads: int, routed_heads: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype, 'bias': False}
        experts = num_heads - shared_heads
        if not (0 < routed_heads <= experts or routed_heads == experts == 0):
            raise ValueError(
                f'Of {num_heads} heads, {shared_heads} shared, routed_heads must be from 1 to {experts}, or 0 if none '
                f'is left; got {routed_heads}.'
            )
        self.shared_heads = shared_heads
        self.wg = nn.Linear(dim, experts, **dd) if experts else None
        self.wg_0 = nn.Linear(dim, 2, **dd) if experts and shared_heads else None
        self.wg_1 = nn.Linear(dim, shared_heads, **dd) if shared_heads > 1 else None
        self.selection = Selection(routed_heads)

    def forward(self, x):
        gates = []
        if self.wg_1 is not None:
            gates.append(self.wg_1(x).softmax(-1) * self.shared_heads)
        elif self.shared_heads:
            gates.append(x.new_ones(*x.shape[:-1], 1))
        if self.wg is not None:
            gates.append(self.selection(self.wg(x).softmax(-1)))
        if self.wg_0 is not None:
            balance = 2 * self.wg_0(x).softmax(-1)
            gates = [gate * weight for gate, weight in zip(gates, balance.split(1, dim=-1), strict=True)]
        return torch.cat(gates, dim=-1)


class MoHTransNeXt(TransNeXt):
    """TransNeXt with a mixture of heads in every attention.

    For training, the authors add 0.01 times a loss that keeps routers from using few heads alone; see `balance_loss`.

    Args:
        shared_heads, routed_heads: of each stage, as for `HeadRouter`.
        arguments: as for `TransNeXt`.
    """

    official_keys = [(r'\.attn\.(wg(?:_[01])?)\.', r'.attn.head_gate.\1.'), *TransNeXt.official_keys]

    def __init__(self, shared_heads, routed_heads, device=None, dtype=None, **arguments):
        super().__init__(device=device, dtype=dtype, **arguments)
        for stage, shared, routed in zip(self.stages, shared_heads, routed_heads, strict=True):
            for block in stage.blocks:
                attn = block.attn
                dim = attn.proj.in_features
                attn.head_gate = HeadRouter(dim, attn.num_heads, shared, routed, device=device, dtype=dtype)
                attn.head_gate.apply(self.init_module)

    @contextmanager
    def balance_loss(self) -> Iterator[Callable[[], torch.Tensor]]:
        """The load-balance loss of the forward passes within, by the function that it yields (section 3.3).

        Mean over the routers of: heads * sum over heads of (mean score * share of pixels that selected the head). With
        gradient checkpointing it has no gradient.

            with model.balance_loss() as balance:
                loss = criterion(model(images), labels) + 0.01 * balance()
        """
        losses = []

        def collect(module, arguments, kept):
            scores = arguments[0].flatten(0, -2)
            share = (kept.flatten(0, -2) > 0).to(scores.dtype).mean(0)
            losses.append((scores.mean(0) * share).mean() * scores.shape[-1] ** 2)

        routers = (module for module in self.modules() if isinstance(module, HeadRouter) and module.wg is not None)
        handles = [router.selection.register_forward_hook(collect) for router in routers]
        try:
            yield lambda: torch.stack(losses).mean()
        finally:
            for handle in handles:
                handle.remove()


small = dict(dims=(72, 144, 288, 576), depths=(5, 5, 22, 5), num_heads=(3, 6, 12, 24))
base = dict(dims=(96, 192, 384, 768), depths=(5, 5, 23, 5), num_heads=(4, 8, 16, 32))

variants(
    MoHTransNeXt,
    moh_transnext_small_80=dict(small, shared_heads=(3, 6, 3, 8), routed_heads=(0, 0, 6, 12), drop_path_rate=0.45),
    moh_transnext_small_75=dict(small, shared_heads=(3, 6, 3, 4), routed_heads=(0, 0, 6, 12), drop_path_rate=0.45),
    moh_transnext_base_75=dict(base, shared_heads=(4, 8, 4, 5), routed_heads=(0, 0, 8, 16), drop_path_rate=0.6),
    moh_transnext_base_50=dict(base, shared_heads=(2, 2, 2, 4), routed_heads=(2, 4, 6, 8), drop_path_rate=0.6),
)
