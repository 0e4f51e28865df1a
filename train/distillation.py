"""Learning from a teacher: hard and soft distillation as DeiT (arXiv 2012.12877) defines them."""

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ['Teacher', 'distillation_loss']


class Teacher(nn.Module):
    """A trained model, frozen and always in eval mode, that sees the student's images in its own normalization.

    Args:
        model: of timm or the zoo, trained on the student's classes.
        num_classes: of the student.
        mean, std: of the student's normalization, for channels in 0..1.

    Raises:
        ValueError: the teacher knows another number of classes.
    """

    def __init__(self, model: nn.Module, num_classes: int, mean, std):
        super().__init__()
        if model.num_classes != num_classes:
            raise ValueError(
                f'The teacher knows {model.num_classes} classes, the student {num_classes}. Train the teacher on these '
                'classes first, and give its weights as teacher.checkpoint.'
            )
        self.model = model.requires_grad_(False)
        own = resolve_model_data_config(model)
        own_mean, own_std = (torch.tensor(own[key], dtype=torch.float64) for key in ('mean', 'std'))
        mean, std = (torch.as_tensor(value, dtype=torch.float64).flatten() for value in (mean, std))
        # (x * std + mean - own_mean) / own_std
        self.register_buffer('scale', (std / own_std).float().view(-1, 1, 1))
        self.register_buffer('shift', ((mean - own_mean) / own_std).float().view(-1, 1, 1))
        self.eval()

    def train(self, mode: bool = True) -> 'Teacher':
        """Stays in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images in the student's normalization (B, C, H, W)."""
        return self.model(images * self.scale + self.shift)


def distillation_loss(logits: Tensor, teacher: Tensor, kind: str = 'hard', tau: float = 1.0) -> Tensor:
    """What a student's logits lose against a teacher's, both (B, K). A scalar.

    'hard': cross-entropy with the teacher's decisions. 'soft': Kullback-Leibler divergence at temperature tau, times
    tau squared, as the mean over all B x K entries (DeiT's choice; a mean over samples would be K times that).

    Raises:
        ValueError: another kind.
    """
    if kind == 'hard':
        return F.cross_entropy(logits, teacher.argmax(dim=1))
    if kind == 'soft':
        student, teacher = F.log_softmax(logits / tau, dim=1), F.log_softmax(teacher / tau, dim=1)
        return F.kl_div(student, teacher, reduction='sum', log_target=True) * tau**2 / logits.numel()
    raise ValueError(f"distillation kind must be 'hard' or 'soft', got {kind!r}.")
