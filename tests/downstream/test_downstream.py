"""Every program of docs/downstream.md, run as it stands with a model of each family."""

import re
import sys
import warnings
from pathlib import Path

import pytest

MODELS = (
    'biformer_tiny',
    'maxvit_tiny',
    'van_b0',
    'nat_mini',
    'dinat_mini',
    'crossformer_tiny',
    'shvit_s1',
    'transnext_micro',
)
WRITTEN = 'van_b0'  # the name that the programs have
ROOT = Path(__file__).parents[2]
REFUSED = {('segmentation_models_pytorch', 'shvit_s1'): 'Unsupported model downsampling pattern.'}
SECTIONS = {
    'segmentation_models_pytorch',
    *('transformers', 'UPerNet', 'Mask2Former', 'DETR', 'RT-DETR', 'Classification'),
    "torchvision's detectors",
    'Lightning',
    'fastai',
    'FiftyOne, CVAT, Label Studio and all else that speaks COCO',
    'mmdetection, mmsegmentation and others on mmengine',
}


def programs() -> dict[str, str]:
    """Section -> its program."""
    text = (ROOT / 'docs' / 'downstream.md').read_text(encoding='utf-8')
    found = {}
    for title, body in re.findall(r'^##+ (.*?)$(.*?)(?=^##|\Z)', text, re.MULTILINE | re.DOTALL):
        code = re.findall(r'^```python\n(.*?)^```', body, re.MULTILINE | re.DOTALL)
        if code:
            (found[title],) = code
    return found


PROGRAMS = programs()


def test_there_is_a_program_of_each_library():
    assert set(PROGRAMS) == SECTIONS
    assert all(WRITTEN in code and 'import zoo' in code for code in PROGRAMS.values())


@pytest.mark.downstream
@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('section', PROGRAMS)
def test_the_program_runs(section, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    # As outside of the repository: transformers would take its folder kernels/, and tests/kernels/, for a library.
    monkeypatch.setattr(sys, 'path', [path for path in sys.path if path not in ('', str(ROOT), str(ROOT / 'tests'))])
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    code = compile(PROGRAMS[section].replace(WRITTEN, name), f'docs/downstream.md, {section}', 'exec')
    refusal = REFUSED.get((section, name))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        if refusal is None:
            exec(code, {'__name__': 'program'})
            return
        with pytest.raises(ValueError, match=f'^{re.escape(refusal)}$'):
            exec(code, {'__name__': 'program'})
    assert refusal in ' '.join((ROOT / 'docs' / 'downstream.md').read_text(encoding='utf-8').split())
