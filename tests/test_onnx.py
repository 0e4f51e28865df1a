"""Models export to ONNX in plain operations, and the file computes what the model does."""

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import TINY, tiny

import zoo


@pytest.mark.parametrize('name', TINY)
def test_onnx_runtime_computes_the_same(name, tmp_path):
    model = tiny(name).eval()
    images = torch.randn(2, 3, 64, 96)
    path = tmp_path / 'model.onnx'
    with zoo.kernels.use('reference'):
        torch.onnx.export(model, (images,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.inference_mode():
        expected = model(images).numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_the_operators_themselves_are_not_onnx():
    with pytest.raises(torch.onnx.OnnxExporterError):
        torch.onnx.export(tiny('nat_mini').eval(), (torch.randn(1, 3, 64, 64),), dynamo=True, verbose=False)
