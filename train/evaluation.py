"""Measures of a trained model."""

import torch
from mmengine.evaluator import BaseMetric
from torch import Tensor

from .registry import METRICS

__all__ = ['TopK', 'label_ranks']


def label_ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """Number of classes that a sample's logits don't put behind its label: 0 if it is predicted. (B, K), (B,) -> (B,).

    A NaN counts against the sample; of equal logits, the label's counts as the greatest.
    """
    own = logits.gather(1, labels[:, None])
    return (~(logits <= own)).sum(dim=1)


@METRICS.register_module()
class TopK(BaseMetric):
    """Percentage of samples whose label is among the k classes of the highest logits, as `top<k>` for each k.

    Args:
        k: numbers of classes.
    """

    def __init__(self, k=(1, 5), **kwargs):
        super().__init__(**kwargs)
        self.k = tuple(k)

    def process(self, data_batch, data_samples) -> None:
        """Take the (images, labels) of a batch and its logits, a row a sample."""
        self.results += label_ranks(torch.stack(list(data_samples)).cpu(), data_batch[1]).tolist()

    def compute_metrics(self, results: list[int]) -> dict[str, float]:
        return {f'top{k}': 100 * sum(rank < k for rank in results) / len(results) for k in self.k}
