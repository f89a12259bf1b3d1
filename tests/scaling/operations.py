"""Which operations a step is made of, as on a device that is not the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_amp import AdvancedGradScaler, MixedPrecisionConfig, ScalingStrategy, statistics
from hf_amp.statistics import _read_by_foreach
from tests.reference import adamw, tiny_mlp


class Dispatched(TorchDispatchMode):
    """Notes the operations that run inside it, by name, and the dtypes of what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.given: set[tuple[str, torch.dtype]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        result = func(*args, **(kwargs or {}))
        tensors = (x for x in tree_leaves(result) if isinstance(x, torch.Tensor))
        self.given.update((func.name(), x.dtype) for x in tensors)
        return result


def steps_of(
    strategy: ScalingStrategy, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> tuple[Dispatched, AdvancedGradScaler, list[float | None]]:
    """Two applied steps and a skipped one, with samples and clipping: what ran, and the norms that were told.

    The second step's squares leave the range of FP32, so that its norm is taken again.
    """
    monkeypatch.setattr(statistics, "_read_on_cpu", _read_by_foreach)
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
    return dispatched, scaler, norms
