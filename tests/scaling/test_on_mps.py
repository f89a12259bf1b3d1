"""No MPS device is needed to see that every operation of a step has a kernel for it: PyTorch ships the list."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torchgen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchgen.gen import parse_native_yaml
from torchgen.model import DispatchKey

from hf_amp import AdvancedGradScaler, MixedPrecisionConfig, ScalingStrategy
from hf_amp.statistics import gradients
from tests.reference import adamw, tiny_mlp


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
    return frozenset(
        f"aten::{name}" for name, how in found.items() if (found[how] if isinstance(how, str) else how)
    )


class Dispatched(TorchDispatchMode):
    """Notes the names of the operations that run inside it, and of those that give FP64, which MPS does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.in_fp64: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        result = func(*args, **(kwargs or {}))
        if any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in tree_leaves(result)):
            self.in_fp64.add(func.name())
        return result


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("strategy", ScalingStrategy)
def test_every_operation_of_a_step_runs_on_mps(
    strategy: ScalingStrategy, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With samples, clipping, two applied steps and a skipped one; as on a device that is not the CPU.

    The second step's squares leave the range of FP32, so that its norm is taken again.
    """
    monkeypatch.setattr(gradients, "_read_on_cpu", gradients._read_by_foreach)
    model = tiny_mlp().append(torch.nn.Linear(3, 2000))  # large enough to be sampled
    scaler = AdvancedGradScaler(
        MixedPrecisionConfig(scaling_strategy=strategy, monitoring_interval=1, init_scale=8.0), "cpu"
    )
    optimizer = adamw(model, fused)
    norms: list[float | None] = []
    with Dispatched() as dispatched:
        for factor in (1.0, 1e25, torch.inf):
            optimizer.zero_grad()
            loss = model(torch.ones(2, 4)).square().mean() * factor
            scaler.scale(loss).backward()
            if fused:
                scaler.clip_grad_norm_(optimizer, 1.0)
            scaler.step(optimizer)
            scaler.update()
            norms.append(scaler.last_outcome.grad_norm if scaler.last_outcome else None)
        scaler.flush()
    assert scaler.applied_steps == 2
    if not fused or strategy is not ScalingStrategy.PERFORMANCE_OPTIMIZED:  # which reads no norm in the step
        assert 1e20 < (norms[1] or 0.0) < torch.inf
    assert "aten::_foreach_norm.Scalar" in dispatched.names
    ours = {name for name in dispatched.names if name.startswith("aten::")}
    assert ours - with_kernel_for_mps() == set()


def test_a_norm_whose_squares_overflow_needs_no_fp64() -> None:
    """MPS does not have it. What else a step does in FP64 asks for the device first."""
    large = [torch.full((3,), 1e30), torch.full((2,), 1e20, dtype=torch.bfloat16)]
    with Dispatched() as dispatched:
        gradients.exact_norm(large, torch.device("cpu"))
    assert dispatched.names - with_kernel_for_mps() == dispatched.in_fp64 == set()
