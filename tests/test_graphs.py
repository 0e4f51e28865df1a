"""Models are whole graphs: for torch.compile, for torch.export with free batch and size, for the meta device."""

import math

import pytest
import torch
from conftest import TINY, tiny
from torch.export import Dim

# Sizes (step, least, others to try) for which one exported graph serves, where no map needs padding.
FREE_SIZES = {
    'van_b0': (1, 33, [(65, 64), (33, 250)]),
    'maxvit_tiny': (1, 33, [(65, 64), (33, 250)]),
    'nat_mini': (1, 224, [(225, 224), (320, 257)]),  # the 7x7 window fits into the last map
    'dinat_mini': (1, 224, [(225, 224), (320, 257)]),
    'dinat_s_tiny': (32, 224, [(320, 224)]),  # and pixels merge two by two
    'biformer_tiny': (224, 224, [(448, 224)]),  # seven regions a side of every map
    'biformer_stl': (224, 224, [(448, 224)]),
    'crossformer_tiny': (32, 256, [(288, 352)]),  # more than a group of every map, and patches merge two by two
    'crossformer_pp_small': (32, 256, [(288, 352)]),
    'transnext_micro': (32, 64, [(96, 160)]),  # pooled tokens of equal sizes
}


@pytest.fixture(autouse=True)
def _forget_other_models():
    """All pyramids have one forward, of which the compiler takes eight versions in a process."""
    torch._dynamo.reset()


@pytest.mark.parametrize('name', TINY)
def test_compiles_without_a_graph_break_forward_and_backward(name):
    model = tiny(name, dtype=torch.float64, drop_path_rate=0.0)
    model.eval()  # BatchNorm's batch statistics of one pixel would amplify rounding
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    want = model(x)
    want.sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    y = compiled(x)
    y.sum().backward()
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    for p, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('name', FREE_SIZES)
def test_exports_with_free_batch_and_size(name):
    model = tiny(name, dtype=torch.float64).eval()
    step, least, others = FREE_SIZES[name]
    height, width = (
        step * Dim(f'{side}_in_steps', min=least // step, max=2048 // step) for side in ('height', 'width')
    )
    if step == 1:
        height, width = Dim('height', min=least, max=2048), Dim('width', min=least, max=2048)
    sizes = {0: Dim('batch', min=1, max=64), 2: height, 3: width}
    example = torch.randn(2, 3, 2 * least, 3 * least, dtype=torch.float64)
    program = torch.export.export(model, (example,), dynamic_shapes=(sizes,)).module()
    for batch, size in enumerate([(least, least), *others], start=1):
        x = torch.randn(batch, 3, *size, dtype=torch.float64)
        torch.testing.assert_close(program(x), model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('name', ['biformer_stl_nchw', 'halonet_h0'])
def test_exports_with_free_batch_where_the_size_shapes_the_graph(name):
    model = tiny(name, dtype=torch.float64).eval()
    example = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    program = torch.export.export(model, (example,), dynamic_shapes=({0: Dim('batch', min=1, max=64)},))
    x = torch.randn(3, 3, 64, 96, dtype=torch.float64)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('name', TINY)
def test_runs_on_the_meta_device(name):
    model = tiny(name, device='meta', features_only=True)
    maps = model(torch.empty(2, 3, 65, 96, device='meta'))
    for y, stride in zip(maps, model.feature_info.reduction(), strict=True):
        assert y.shape[2:] == (math.ceil(65 / stride), math.ceil(96 / stride))
