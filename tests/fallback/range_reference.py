"""Which modules leave FP16's range, and what of the work is not theirs: slow and obvious."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

Batch = dict[str, Tensor]

aten = torch.ops.aten
_PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution}
"""What linear layers, convolutions, einsum and attention (its MATH kernel) come down to."""


class _Amax(TorchDispatchMode):
    """Notes, per module, the largest magnitude that goes into or comes out of a matrix product."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.amax: dict[str, float] = {}
        self._running = [""]
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: self._running.append(name))
            module.register_forward_hook(lambda *_: self._running.pop() and None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func.overloadpacket in _PRODUCTS:
            name = self._running[-1]
            for tensor in (*args, output):
                if isinstance(tensor, Tensor):
                    self.amax[name] = max(float(tensor.abs().max()), self.amax.get(name, 0.0))
        return output


def matmul_amax(model: nn.Module, batch: Batch) -> dict[str, float]:
    """Qualified name of the innermost module → largest magnitude in the operands and results of its matrix products.

    An FP64 forward pass of a copy of a model that nothing is attached to; every matrix product is looked at, those
    inside of attention too.
    """
    double = copy.deepcopy(model).double()
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _Amax(double) as seen:
        double(**inputs)
    return seen.amax


def modules_out_of_range(model: nn.Module, batch: Batch) -> frozenset[str]:
    """Qualified names of the modules whose matrix products have an operand or a result that FP16 rounds to inf.

    Embeddings and norms are none of them, however large their outputs: autocast leaves them in FP32.
    """
    return frozenset(
        name for name, amax in matmul_amax(model, batch).items() if torch.tensor(amax).to(torch.float16).isinf()
    )


def fp16_flop_share(model: nn.Module, batch: Batch, fp32_modules: Collection[str]) -> float:
    """Share of the matrix-multiply FLOPs of a forward pass that is not inside any of `fp32_modules`."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**batch)
    root = type(model).__name__
    flops = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    outermost = [name for name in fp32_modules if not any(name.startswith(f"{other}.") for other in fp32_modules)]
    return 1 - sum(flops.get(f"{root}.{name}", 0) for name in outermost) / flops["Global"]
