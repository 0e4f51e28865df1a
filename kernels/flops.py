"""What the operators compute, told to PyTorch's counter (torch.utils.flop_counter.FlopCounterMode).

Counted are the products that the definitions need, two FLOPs each: not what an implementation computes beyond them, nor
biases and softmax, which the counter leaves out of other models too. Plain formulations are counted as what they are
made of; products that these write as multiplications and sums are not seen by the counter.
"""

import inspect
from collections.abc import Callable

import torch
from torch.utils.flop_counter import register_flop_formula

# The scores again, and the gradients of weights, queries, keys and values, where a forward has scores and output.
BACKWARD = 5 / 2


def register(operator: str, products: Callable[..., int], backward: Callable[..., int] | None = None) -> None:
    """Count custom operator zoo::`operator` and its backward by the multiply-accumulates of the forward.

    `products` computes these from arguments of the operators, which it has by name; of tensors it gets the shapes.
    `backward` does so for the backward, which has `BACKWARD` times as many unless it is given.
    """
    of_backward = (backward, 1) if backward else (products, BACKWARD)
    for name, (count, factor) in ((operator, (products, 1)), (f'{operator}_backward', of_backward)):
        packet = getattr(torch.ops.zoo, name)
        positions = {argument.name: i for i, argument in enumerate(packet.default._schema.arguments)}
        wanted = [positions[name] for name in inspect.signature(count).parameters]

        @register_flop_formula(packet)
        def flops(*arguments, out_val=None, out_shape=None, wanted=wanted, count=count, factor=factor):
            return int(2 * factor * count(*(arguments[i] for i in wanted)))
