import pytest
import torch

import zoo.train  # noqa: F401 -- registers the models, and imports yapf before test files import mmengine
from zoo.kernels.launch import INTERPRETED

# One variant of each family, the smallest; stl_nchw for BiFormer's other layout.
SMALLEST = (
    'biformer_tiny',
    'biformer_stl_nchw',
    'van_b0',
    'nat_mini',
    'dinat_mini',
    'dinat_s_tiny',
    'maxvit_tiny',
    'crossformer_tiny',
    'crossformer_pp_small',
    'transnext_micro',
    'halonet_h0',
    'halonet26t_dynamic',
    'crossvit_tiny_240_dynamic',
    'shvit_s1_distilled',
    'smt_t',
    'overlock_xt',
    'glnet_4g',
    'glnet_stl',
    'glnet_4g_tklb',
    'litv2_s',
    'illama_tiny',
    'stvit_small',
    'moh_transnext_small_80',
    'eca_resnet18',
    'eca_mobilenetv2_100',
    'spectformer_tiny',
    'spectformer_h_s',
    'vitaev2_vsa_s',
    'fcaformer_l1',
    'dhvt_tiny_imagenet_patch16',
)

# Arguments that keep a family's structure in a model small enough for a quick test.
TINY = {
    'fcaformer_l1': dict(dims=(16, 32, 32, 48), depths=(1, 1, 3, 2), num_heads=(0, 0, 2, 3)),
    'dhvt_tiny_imagenet_patch16': dict(embed_dim=32, depth=3, num_heads=2),
    'biformer_tiny': dict(dims=(32, 64, 64, 64), depths=(1, 1, 2, 1)),
    'biformer_stl': dict(dims=(32, 64, 64, 64), depths=(1, 1, 2, 1)),
    'biformer_stl_nchw': dict(dims=(32, 64, 64, 64), depths=(1, 1, 2, 1)),
    'van_b0': dict(dims=(16, 32, 32, 48), depths=(1, 1, 2, 1)),
    'nat_mini': dict(dim=16, depths=(2, 2, 2, 1), num_heads=(1, 2, 2, 4)),
    'dinat_mini': dict(dim=16, depths=(2, 2, 2, 1), num_heads=(1, 2, 2, 4)),
    'dinat_s_tiny': dict(dim=16, depths=(2, 2, 2, 1), num_heads=(1, 2, 2, 4)),
    'maxvit_tiny': dict(dims=(32, 64, 64, 96), depths=(1, 1, 2, 1), stem_dim=32),
    'crossformer_tiny': dict(dim=32, depths=(2, 2, 2, 1), num_heads=(1, 2, 2, 4)),
    'crossformer_pp_small': dict(dim=32, depths=(2, 2, 4, 1), num_heads=(1, 2, 2, 4)),
    'transnext_micro': dict(dims=(24, 48, 48, 96), depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4)),
    'smt_t': dict(dims=(16, 32, 32, 64), depths=(1, 1, 2, 1), num_heads=(0, 0, 2, 4)),
    'spectformer_tiny': dict(embed_dim=32, depth=3, spectral_depth=2, num_heads=2),
    'spectformer_h_s': dict(dims=(16, 32, 32, 64), depths=(1, 1, 2, 1), num_heads=(0, 0, 2, 4), stem_dim=16),
    'vitaev2_vsa_s': dict(
        patch_dims=(16, 16, 32, 64),
        dims=(16, 32, 64, 128),
        depths=(1, 1, 2, 1),
        num_heads=(1, 2, 4, 4),
        reduction_heads=(1, 1, 2, 4),
    ),
    'spectformer_h_s_notoken': dict(dims=(16, 32, 32, 64), depths=(1, 1, 2, 1), num_heads=(0, 0, 2, 4), stem_dim=16),
    'moh_transnext_small_80': dict(
        dims=(24, 48, 72, 96),
        depths=(1, 1, 2, 1),
        num_heads=(1, 2, 3, 4),
        shared_heads=(0, 2, 1, 2),
        routed_heads=(1, 0, 1, 1),
    ),
    'stvit_small': dict(dims=(16, 32, 32, 48), depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 3)),
    'litv2_s': dict(dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 4), alpha=0.5),
    'glnet_4g': dict(dims=(32, 64, 64, 64), depths=(1, 1, 2, 1)),
    'glnet_stl_paramslot': dict(dims=(32, 64, 64, 64), depths=(1, 1, 2, 1)),
    'glnet_4g_tklb': dict(dims=(32, 64, 64, 64), depths=(1, 1, 2, 1)),
    'overlock_xt': dict(dims=(16, 32, 32, 64), depths=(1, 1, 1, 1, 2, 2), num_heads=(1, 2)),
    'illama_tiny': dict(embed_dim=32, depth=3, num_heads=2),
    'halonet_h0': dict(dims=(16, 32, 32, 64), depths=(1, 1, 2, 1), num_heads=(2, 2, 4, 4)),
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors are fastest on one thread, and tests run beside each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(name: str, **kwargs):
    """A small model of the family of variant `name`."""
    import timm

    return timm.create_model(name, **{**TINY[name], **kwargs})


def pytest_collection_modifyitems(config, items):
    """Deselect what needs a GPU where there is none, and what needs Triton to interpret, or not to.

    It interprets in a whole process or not at all: tests of the other kind are not this process's.
    """
    unfit = ['compiled' if INTERPRETED else 'interpreted', *([] if torch.cuda.is_available() else ['gpu'])]
    others = [item for item in items if any(item.get_closest_marker(name) for name in unfit)]
    items[:] = [item for item in items if item not in others]
    config.hook.pytest_deselected(items=others)
