"""Which modules leave FP16's range, and what of the work is not theirs: slow and obvious."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from hf_amp.emulation import _REDUCED_PRECISION_FUNCTIONS

Batch = dict[str, Tensor]


class _Amax(TorchFunctionMode):
    """Notes, per module, the largest magnitude that goes into or comes out of what autocast runs in FP16."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.amax: dict[str, float] = {}
        self._running = [""]
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: self._running.append(name))
            module.register_forward_hook(lambda *_: self._running.pop() and None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func in _REDUCED_PRECISION_FUNCTIONS:
            name = self._running[-1]
            factors = {
                name: value for name, value in kwargs.items() if name != "attn_mask"
            }  # masks hold -inf
            for tensor in _floats((args[:3], factors, output)):
                amax = float(tensor.detach().abs().max())
                self.amax[name] = max(amax, self.amax.get(name, 0.0))
        return output


def _floats(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield from [value] if value.is_floating_point() else []
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _floats(item)
    elif isinstance(value, dict):
        yield from _floats(list(value.values()))


def matmul_amax(model: nn.Module, batch: Batch) -> dict[str, float]:
    """Qualified name of the innermost module → largest magnitude in the operands and results of its matrix products.

    An FP64 forward pass of a copy; every matrix product, convolution and attention is looked at.
    """
    double = copy.deepcopy(model).double()
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
    with torch.no_grad(), _Amax(double) as seen:
        double(**inputs)
    return seen.amax


def modules_out_of_range(model: nn.Module, batch: Batch) -> frozenset[str]:
    """Qualified names of the modules whose matrix products have an operand or a result that FP16 rounds to inf.

    Embeddings and norms are none of them, however large their outputs: autocast leaves them in FP32.
    """
    return frozenset(
        name
        for name, amax in matmul_amax(model, batch).items()
        if torch.tensor(amax).to(torch.float16).isinf()
    )


def fp16_flop_share(model: nn.Module, batch: Batch, fp32_modules: Collection[str]) -> float:
    """Share of the matrix-multiply FLOPs of a forward pass that is not inside any of `fp32_modules`."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**batch)
    root = type(model).__name__
    flops = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    outermost = [
        name for name in fp32_modules if not any(name.startswith(f"{other}.") for other in fp32_modules)
    ]
    return 1 - sum(flops.get(f"{root}.{name}", 0) for name in outermost) / flops["Global"]
