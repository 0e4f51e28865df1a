"""Backbones as pyramids of maps."""

from collections.abc import Sequence

from timm.layers import LayerNorm2d
from timm.models import FeatureInfo
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..tasks import create_backbone

__all__ = ['Features', 'freeze_statistics', 'levels']


def levels(channels: Sequence[int], strides: Sequence[int]) -> FeatureInfo:
    """What tells of a pyramid of these channels and strides, finest first, as a backbone's `feature_info` does."""
    info = [
        {'num_chs': width, 'reduction': stride, 'module': f'levels.{i}'}
        for i, (width, stride) in enumerate(zip(channels, strides, strict=True))
    ]
    return FeatureInfo(info, tuple(range(len(info))))


def freeze_statistics(model: nn.Module) -> None:
    """Have BatchNorms normalize by their stored statistics and keep them, until the next `train()`."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


class Features(nn.Module):
    """A backbone that gives maps (B, C, H, W), finest first.

    Args:
        name, checkpoint: of `create_backbone`.
        out_indices: levels to give; those that the model gives by default if None.
        output_norms: epsilon of a LayerNorm over the channels of each map given, as the dense code of BiFormer (1e-6)
            and NAT (1e-5) has; the model itself goes on with what isn't normalized. None for no such norms.
        kwargs: other arguments of `create_backbone`, the model's among them (drop_path_rate, n_win, ...).

    Attributes:
        feature_info: timm's, of the maps given.
        pretrained_cfg: timm's, of the model: mean and standard deviation of its images among it.

    Raises:
        ValueError: no such model, an argument that it doesn't take, or it gives no maps.
    """

    def __init__(
        self,
        name: str,
        checkpoint: str | None = None,
        out_indices: Sequence[int] | None = None,
        output_norms: float | None = None,
        **kwargs,
    ):
        super().__init__()
        if out_indices is not None:
            kwargs['out_indices'] = tuple(out_indices)
        try:
            self.model = create_backbone(name, checkpoint, features_only=True, **kwargs)
        except (AssertionError, RuntimeError) as error:  # timm's, of models without features and levels they don't have
            raise ValueError(f'{name} can not give feature maps with {kwargs}: {error}') from error
        self.feature_info = self.model.feature_info
        self.pretrained_cfg = getattr(self.model, 'pretrained_cfg', None)
        widths = () if output_norms is None else self.feature_info.channels()
        self.norms = nn.ModuleList(LayerNorm2d(width, eps=output_norms) for width in widths)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.model(images)
        return [norm(x) for norm, x in zip(self.norms, maps, strict=True)] if self.norms else list(maps)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.model.set_grad_checkpointing(enable)
