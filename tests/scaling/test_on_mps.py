"""No MPS device is needed to see that every operation of a step has a kernel for it: PyTorch ships the list."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torchgen
from torch.utils._python_dispatch import TorchDispatchMode
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
    """Notes the names of the operations that run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("strategy", ScalingStrategy)
def test_every_operation_of_a_step_runs_on_mps(
    strategy: ScalingStrategy, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With samples, clipping, an applied and a skipped step; as on a device that is not the CPU."""
    monkeypatch.setattr(gradients, "_read_on_cpu", gradients._read_by_foreach)
    model = tiny_mlp().append(torch.nn.Linear(3, 2000))  # large enough to be sampled
    scaler = AdvancedGradScaler(
        MixedPrecisionConfig(scaling_strategy=strategy, monitoring_interval=1, init_scale=8.0), "cpu"
    )
    optimizer = adamw(model, fused)
    with Dispatched() as dispatched:
        for factor in (1.0, torch.inf):
            optimizer.zero_grad()
            loss = model(torch.ones(2, 4)).square().mean() * factor
            scaler.scale(loss).backward()
            if fused:
                scaler.clip_grad_norm_(optimizer, 1.0)
            scaler.step(optimizer)
            scaler.update()
        scaler.flush()
    assert "aten::_foreach_norm.Scalar" in dispatched.names
    ours = {name for name in dispatched.names if name.startswith("aten::")}
    assert ours - with_kernel_for_mps() == set()
