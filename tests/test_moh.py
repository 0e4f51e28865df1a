"""MoH: routers of heads, by hand."""

import pytest
import torch
from conftest import tiny

from zoo.backbones.moh import HeadRouter


def test_shared_heads_come_first_and_of_the_others_the_best_are_kept():
    router = HeadRouter(8, num_heads=5, shared_heads=2, routed_heads=2).double()
    x = torch.randn(3, 8, dtype=torch.float64)
    for weights, pixel in zip(router(x), x, strict=True):
        of_shared, of_routed = 2 * (router.wg_0.weight @ pixel).softmax(0)
        scores = (router.wg.weight @ pixel).softmax(0)
        scores[scores.argmin()] = 0
        expected = [2 * of_shared * (router.wg_1.weight @ pixel).softmax(0), 2 * of_routed * scores / scores.sum()]
        torch.testing.assert_close(weights, torch.cat(expected))


@pytest.mark.parametrize(('shared', 'routed'), [(1, 1), (0, 3), (3, 0)])
def test_weights_of_the_heads_sum_to_their_number_in_use(shared, routed):
    router = HeadRouter(8, num_heads=3, shared_heads=shared, routed_heads=routed)
    weights = router(torch.randn(2, 5, 7, 8))
    assert weights.shape == (2, 5, 7, 3)
    if not (shared and routed):
        torch.testing.assert_close(weights.sum(-1), torch.full((2, 5, 7), float(shared + routed)))
    assert ((weights > 0).sum(-1) == shared + routed).all()


@pytest.mark.parametrize(('shared', 'routed'), [(1, 0), (2, 2), (3, 1)])
def test_heads_that_nobody_would_use_are_refused(shared, routed):
    with pytest.raises(ValueError, match='routed_heads'):
        HeadRouter(8, num_heads=3, shared_heads=shared, routed_heads=routed)


def test_the_balance_loss_is_that_of_the_formula_and_trains_the_routers():
    model = tiny('moh_transnext_small_80').double()
    seen = []
    for module in model.modules():
        if isinstance(module, HeadRouter) and module.wg is not None:
            module.wg.register_forward_hook(lambda linear, args, logits: seen.append((linear, logits.detach())))
            count = module.selection.count
    with model.balance_loss() as balance:
        model(torch.randn(2, 3, 64, 64, dtype=torch.float64))
        loss = balance()
    expected = []
    for _, logits in seen:
        scores = logits.softmax(-1).flatten(0, -2)
        heads = scores.shape[1]
        chosen = torch.zeros_like(scores).scatter(1, scores.topk(count, dim=1).indices, 1.0)
        expected.append(heads**2 * (scores.mean(0) * chosen.mean(0)).mean())
    assert len(seen) == 4  # of the five attentions, one shares all its heads
    torch.testing.assert_close(loss.detach(), torch.stack(expected).mean())
    loss.backward()
    assert all(linear.weight.grad.abs().sum() > 0 for linear, logits in seen if logits.shape[-1] > 1)
    model(torch.randn(1, 3, 64, 64, dtype=torch.float64))
    assert balance() == loss  # nothing is collected outside
