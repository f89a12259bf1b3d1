"""How often a step boundary goes over the gradients, counted by the operations that take them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_amp import AdvancedGradScaler, MixedPrecisionConfig
from tests.reference import adamw

SIZES = [(300, 500), (128, 128), (128,), (7,)]


class Reads(TorchDispatchMode):
    """Counts the operations that take each of `tensors`, or a part of it; making a view is none."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.elements = Counter({t.untyped_storage().data_ptr(): 0 for t in tensors})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        makes_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        tensors = [] if makes_view else [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        parts = {(t.untyped_storage().data_ptr(), t.storage_offset()): t.numel() for t in tensors}
        for (storage, _), elements in parts.items():
            if storage in self.elements:
                self.elements[storage] += elements
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("non_finite", [False, True])
@pytest.mark.parametrize("mode", ["BF16", "FP32"])
def test_a_guard_reads_the_gradients_once(mode: str, non_finite: bool) -> None:
    """Beside what the optimizer itself does; only where something was not finite are they looked at again."""
    model = nn.ParameterList(torch.zeros(size) for size in SIZES)
    for parameter in model:
        parameter.grad = torch.ones_like(parameter)
    model[1].grad[3, 3] = torch.nan if non_finite else 1.0
    gradients = [p.grad for p in model]
    guard, optimizer = (AdvancedGradScaler(MixedPrecisionConfig(precision_mode=mode), "cpu"), adamw(model, True))
    with Reads(gradients) as alone:
        optimizer.step()
    with Reads(gradients) as guarded:
        guard.step(optimizer)
        guard.update()
    for gradient in gradients:
        at = gradient.untyped_storage().data_ptr()
        added = guarded.elements[at] - (0 if non_finite else alone.elements[at])
        assert (added > gradient.numel()) if non_finite else (added == gradient.numel())
