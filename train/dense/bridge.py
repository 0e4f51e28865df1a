"""Backbones of timm and the zoo in configs of mmdet, mmseg and other libraries on mmengine.

    custom_imports = dict(imports=['zoo.train.dense.bridge'])
    model = dict(backbone=dict(type='TimmBackbone', name='nat_mini', checkpoint='nat_mini.pth'), ...)

It is registered in mmengine's own registry, which theirs fall back to: whichever of them is installed finds it, as
'TimmBackbone' or 'mmengine.TimmBackbone', and none has to be.
"""

from collections.abc import Mapping, Sequence

from mmengine.registry import MODELS
from torch import Tensor, nn

from .features import Features, freeze_statistics

__all__ = ['TimmBackbone']


@MODELS.register_module()
class TimmBackbone(nn.Module):
    """A backbone that gives a tuple of maps (B, C, H, W), finest first.

    Args:
        name, checkpoint, out_indices, output_norms: of `Features`.
        pretrained: download the weights, where there is a link.
        norm_eval: BatchNorms keep to their stored statistics in training.
        with_cp: compute activations again in the backward pass instead of keeping them.
        init_cfg: None, or dict(type='Pretrained', checkpoint=FILE), which is `checkpoint`.
        model_name, features_only, in_channels, checkpoint_path: what mmseg's and mmpretrain's TIMMBackbone calls name,
            (nothing else than True), in_chans and checkpoint, so that its configs need another type alone.
        kwargs: the model's arguments (drop_path_rate, n_win, ...).

    Attributes:
        feature_info: timm's, of the maps: `channels()` for a neck's `in_channels`.

    Raises:
        ValueError: no such model, an argument that it doesn't take, or it gives no maps.
        FileNotFoundError, CheckpointError: the checkpoint isn't there, or doesn't fit.
    """

    def __init__(
        self,
        name: str | None = None,
        checkpoint: str | None = None,
        out_indices: Sequence[int] | None = None,
        output_norms: bool = False,
        pretrained: bool = False,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: Mapping | None = None,
        model_name: str | None = None,
        features_only: bool = True,
        in_channels: int | None = None,
        checkpoint_path: str = '',
        **kwargs,
    ):
        super().__init__()
        name = _one('name', name, 'model_name', model_name)
        if name is None:
            raise ValueError('TimmBackbone needs the name of a model.')
        if not features_only:
            raise ValueError('TimmBackbone gives maps: features_only can only be True.')
        checkpoint = _one('checkpoint', checkpoint, 'checkpoint_path', checkpoint_path or None)
        checkpoint = _one('checkpoint', checkpoint, 'init_cfg', _initial(init_cfg))
        if in_channels is not None:
            kwargs['in_chans'] = in_channels
        self.features = Features(name, checkpoint, out_indices, output_norms, pretrained=pretrained, **kwargs)
        self.feature_info = self.features.feature_info
        self.norm_eval = norm_eval
        if with_cp:
            self.features.set_grad_checkpointing(True)

    def init_weights(self) -> None:
        """Nothing: the model comes initialized or loaded, and mmengine would call its init_weights again."""

    def train(self, mode: bool = True):
        super().train(mode)
        if mode and self.norm_eval:
            freeze_statistics(self)
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.features(images))


def _one(name: str, value: str | None, other_name: str, other: str | None) -> str | None:
    """The one of two arguments of one meaning that is given."""
    if value is not None and other is not None:
        raise ValueError(f'{name} and {other_name} mean the same, and both are given: {value!r}, {other!r}.')
    return other if value is None else value


def _initial(init_cfg: Mapping | None) -> str | None:
    if init_cfg is None:
        return None
    if init_cfg.get('type') != 'Pretrained' or set(init_cfg) != {'type', 'checkpoint'}:
        raise ValueError(
            f"init_cfg can only be None or dict(type='Pretrained', checkpoint=FILE), got {dict(init_cfg)}."
        )
    return init_cfg['checkpoint']
