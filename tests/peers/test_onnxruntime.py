"""A second engine: onnxruntime runs the rescaled model in FP16, and gives NaN for the original.

Skipped where onnxruntime and what exports to it are not installed; tests/README.md says how.
"""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_amp.rescale import rescale_for_fp16
from tests.rescale.families import FAMILIES, Family

pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")),
    reason="needs onnx, onnxruntime and onnxscript; tests/README.md says how to install them",
)
NAMES = ("GPT2LMHeadModel", "LlamaForCausalLM")


class Logits(nn.Module):
    """What is exported: tokens in, logits out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def run_by_onnxruntime(model: Any, input_ids: Tensor, file: Path) -> Tensor:
    """Logits of the model, exported with half parameters."""
    import onnxruntime

    half = Logits(copy.deepcopy(model).half()).eval()
    torch.onnx.export(half, (input_ids,), str(file), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: input_ids.numpy()})
    return torch.from_numpy(logits)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name in NAMES], ids=lambda f: f.name)
def test_onnxruntime_agrees_in_fp16(family: Family, tmp_path: Path) -> None:
    """The logits are FP32's within FP16's rounding; those of the original are NaN."""
    blown, ids = family.blown_up({"stream": 22}), family.inputs()["input_ids"]
    report = rescale_for_fp16(blown, family.inputs())
    assert report.safe
    assert run_by_onnxruntime(blown, ids, tmp_path / "original.onnx").isnan().any()
    logits = run_by_onnxruntime(report.model, ids, tmp_path / "rescaled.onnx")
    assert logits.dtype is torch.float16
    with torch.no_grad():
        exact = blown(ids).logits
    assert (logits.float() - exact).abs().max() < 5e-3 * exact.abs().max()
