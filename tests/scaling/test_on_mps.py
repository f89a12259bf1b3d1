"""No MPS device is needed to see that every operation of a step has a kernel for it: PyTorch ships the list."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
import torchgen
from torchgen.gen import parse_native_yaml
from torchgen.model import DispatchKey

from hf_amp import ScalingStrategy
from hf_amp.statistics import exact_norm
from tests.each import for_each
from tests.scaling.operations import Dispatched, steps_of


@cache
def with_kernel_for_mps() -> frozenset[str]:
    """Names of the operations that run on MPS, by a kernel of its own or by one for every device."""
    folder = Path(torchgen.__path__[0]) / "packaged" / "ATen" / "native"
    parsed = parse_native_yaml(str(folder / "native_functions.yaml"), str(folder / "tags.yaml"))
    found = {}
    for function in parsed.native_functions:
        found[str(function.func.name)] = (
            parsed.backend_indices[DispatchKey.MPS].has_kernel(function)
            or function.has_composite_kernel
            or (function.structured_delegate is not None and str(function.structured_delegate))
        )
    return frozenset(f"aten::{name}" for name, how in found.items() if (found[how] if isinstance(how, str) else how))


@for_each("fused", [True, False])
@for_each("strategy", ScalingStrategy)
def test_every_operation_of_a_step_runs_on_mps(
    strategy: ScalingStrategy, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With samples, clipping, two applied steps and a skipped one; as on a device that is not the CPU."""
    dispatched, scaler, norms = steps_of(strategy, fused, monkeypatch)
    assert scaler.applied_steps == (1 if fused and strategy.defers else 2)
    if not fused or strategy is not ScalingStrategy.PERFORMANCE_OPTIMIZED:  # which reads no norm in the step
        assert 1e20 < (norms[1] or 0.0) < torch.inf
    assert "aten::_foreach_norm.Scalar" in dispatched.names
    ours = {name for name in dispatched.names if name.startswith("aten::")}
    assert ours - with_kernel_for_mps() == set()


def test_a_norm_whose_squares_overflow_needs_no_fp64() -> None:
    """MPS does not have it. What else a step does in FP64 asks for the device first."""
    large = [torch.full((3,), 1e30), torch.full((2,), 1e20, dtype=torch.bfloat16)]
    with Dispatched() as dispatched:
        exact_norm(large, torch.device("cpu"))
    assert dispatched.names - with_kernel_for_mps() == set()
    assert torch.float64 not in {dtype for _, dtype in dispatched.given}
