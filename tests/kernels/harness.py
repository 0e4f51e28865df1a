"""What every operator's tests share: one table of tolerances, inputs as models pass them, and the comparison.

An implementation is held against the operator's reference on the same inputs: the output and the gradient of every
input, in the greatest difference relative to the greatest reference value.
"""

import torch
from torch import Tensor

# float64 and float32: sums of a few hundred terms, in another order. Halves: computed in float32 and rounded once, so
# within a unit in the last place of the greatest value; two leave room for sums that cancel.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 2 * torch.finfo(torch.bfloat16).eps,
    torch.float16: 2 * torch.finfo(torch.float16).eps,
}


def packed(*shape: int, parts: int = 3, dtype=torch.float64, seed: int = 0) -> list[Tensor]:
    """`parts` tensors of `shape` (batch, ..., heads, head_dim): views of one tensor, as of a packed qkv projection.

    The packed tensor lies inside of a NaN margin: a read outside of the views shows in the result.
    """
    *outer, heads, head_dim = shape
    generator = torch.Generator().manual_seed(seed)
    memory = torch.full([outer[0], *(n + 2 for n in outer[1:]), parts + 1, heads, head_dim], torch.nan, dtype=dtype)
    inside = (slice(None), *(slice(1, -1) for _ in outer[1:]), slice(0, parts))
    size = memory[inside].shape
    memory[inside] = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
    return list(memory[inside].unbind(len(outer)))


def random(*shape: int, dtype=torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_close(actual: Tensor, expected: Tensor, what: str = 'output', tolerance: float | None = None) -> None:
    """The greatest difference is within the dtype's tolerance times the greatest expected value, and nothing is NaN."""
    assert actual.shape == expected.shape, f'{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}'
    tolerance = TOLERANCE[actual.dtype] if tolerance is None else tolerance
    if not expected.numel():
        return
    difference = (actual.double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    assert difference <= tolerance * scale, f'{what}: {difference:.2e} off at values up to {scale:.2e}'


def output_and_gradients(function, inputs: dict[str, Tensor | None], grad_output=None, needs=None, rounding=None):
    """(output, {name: gradient}) of function(**inputs) for `grad_output` (random when None), for the names in `needs`.

    The inputs are taken with their strides: they are detached, not copied. A random `grad_output` has the values that
    there are in the dtype `rounding`, the output's when None.
    """
    inputs = {name: None if x is None else x.detach() for name, x in inputs.items()}
    needs = [name for name, x in inputs.items() if x is not None] if needs is None else needs
    for name in needs:
        inputs[name].requires_grad_()
    output = function(**inputs)
    if not needs:
        return output, {}
    if grad_output is None:
        grad_output = random(*output.shape, seed=2).to(rounding or output.dtype)
    gradients = torch.autograd.grad(output, [inputs[name] for name in needs], grad_output.to(output.dtype))
    return output.detach(), dict(zip(needs, gradients, strict=True))


def assert_equal_functions(candidate, reference, inputs: dict[str, Tensor | None], grad_output=None, needs=None):
    """`candidate` gives the output and every gradient that `reference` gives in float64 of the same inputs."""
    exact = {name: None if x is None else x.double() for name, x in inputs.items()}
    actual, actual_gradients = output_and_gradients(candidate, inputs, grad_output, needs)
    expected, expected_gradients = output_and_gradients(reference, exact, grad_output, needs, actual.dtype)
    assert_close(actual, expected)
    for name, gradient in actual_gradients.items():
        assert gradient.dtype == inputs[name].dtype, f'gradient of {name}: {gradient.dtype}'
        assert_close(gradient, expected_gradients[name], f'gradient of {name}', TOLERANCE[actual.dtype])
