"""`torch.use_deterministic_algorithms`, as a Trainer's `full_determinism` sets it, makes some operations an error on CUDA."""

from __future__ import annotations

import re

import pytest
import torch

from hf_amp import ScalingStrategy
from tests.each import for_each
from tests.scaling.operations import steps_of


def refused_on_cuda() -> set[str]:
    """Names of the functions that PyTorch's documentation lists as errors then, for floats at least."""
    _, _, reported = (torch.use_deterministic_algorithms.__doc__ or "").partition("operations will throw a")
    return {name.rpartition(".")[2] for name in re.findall(r":(?:func|meth):`torch\.([\w.]+)`", reported)}


@for_each("fused", [True, False])
@for_each("strategy", ScalingStrategy)
def test_no_operation_of_a_step_is_refused(
    strategy: ScalingStrategy, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With samples, clipping, two applied steps and a skipped one."""
    assert {"cumsum", "histc", "median"} <= refused_on_cuda()
    dispatched, scaler, _ = steps_of(strategy, fused, monkeypatch)
    assert scaler.applied_steps == (1 if fused and strategy.defers else 2)
    of_floats = {name for name, dtype in dispatched.given if dtype.is_floating_point}
    assert {name.removeprefix("aten::").partition(".")[0] for name in of_floats} & refused_on_cuda() == set()
