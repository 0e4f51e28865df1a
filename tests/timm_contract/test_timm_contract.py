"""timm's own tests of models, unmodified, from the source archive of the installed version."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import timm
from conftest import SMALLEST

from zoo.backbones import catalogue

CACHE = Path(__file__).parents[2] / '.cache'


@pytest.fixture(scope='session')
def timm_tests() -> Path:
    """timm's test_models.py; pip fetches the archive once."""
    CACHE.mkdir(exist_ok=True)
    name = f'timm-{timm.__version__}'
    if not (CACHE / f'{name}.tar.gz').exists():
        download = [sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--no-binary', ':all:', '-d', CACHE]
        subprocess.run([*download, f'timm=={timm.__version__}'], check=True)
    if not (CACHE / name / 'tests').exists():
        with tarfile.open(CACHE / f'{name}.tar.gz') as archive:
            archive.extractall(CACHE, filter='data')
    return CACHE / name / 'tests' / 'test_models.py'


def passes(test_file: Path, models: str) -> int:
    """Number of timm's tests that passed for the models; fails if one did not."""
    env = {
        **os.environ,
        'ZOO_MODELS': models,
        'OMP_NUM_THREADS': '1',
        'PYTHONPATH': str(Path(__file__).parent),
    }
    command = [sys.executable, '-m', 'pytest', '-p', 'narrow_to_zoo', '--import-mode=importlib', '-q', '-W', 'ignore']
    command += ['-p', 'no:cacheprovider', '--rootdir', str(test_file.parent), '-c', os.devnull, str(test_file)]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    return int(re.search(r'(\d+) passed', result.stdout)[1])


def expected(name: str) -> int:
    """Tests: forward, backward, features_only, intermediates (2), pruning, fx (2), each cfg; TorchScript (2) for VAN.

    timm leaves sequences of tokens (CrossViT, DHVT, iLLaMA, SpectFormer of one width) out of those of cfgs and
    features_only.
    """
    family = name.partition('_')[0]
    if family in ('crossvit', 'dhvt', 'illama') or (family == 'spectformer' and not name.startswith('spectformer_h_')):
        return 7
    return 8 + len(timm.models.get_arch_pretrained_cfgs(name)) + (2 if family == 'van' else 0)


@pytest.mark.parametrize('name', SMALLEST)
def test_one_variant_of_each_family_passes_timms_tests(timm_tests, name):
    assert passes(timm_tests, name) == expected(name)


@pytest.mark.slow
@pytest.mark.parametrize('name', sorted({*catalogue.variant_names(registered_by_zoo=True)} - {*SMALLEST}))
def test_every_variant_passes_timms_tests(timm_tests, name):
    assert passes(timm_tests, name) == expected(name)
