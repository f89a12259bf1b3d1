"""What half-precision parameters do to a model in inference, where no autocast keeps anything in FP32."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_amp.emulation import EmulatedPrecision
from hf_amp.fallback.module_precision import CurrentPrecision, PrecisionEntry, without_its_precision
from hf_amp.fallback.operators import BadOperator
from hf_amp.fallback.recorder import RecordedForward
from hf_amp.fallback.replay import float_tensors, replay
from hf_amp.patch_log import takes_hooks
from hf_amp.precision import BF16_FORMAT, FP16_FORMAT, NumberFormat, PrecisionMode


@dataclass
class Headroom:
    """The largest finite value that a module returns.

    Attributes:
        module: the module's name; "" for the model itself.
        amax: that value's magnitude.
        bits: log2 of how many times larger it may get before it overflows; negative where it does.
    """

    module: str
    amax: float
    bits: float


@dataclass
class InferenceCheck:
    """What a copy of a model in one half-precision format does on a batch.

    Attributes:
        number_format: the format of its parameters.
        overflowing: modules whose output leaves its range although their inputs are in it, in the order in which they run.
        operators: module → the operator in it that overflows, its line and its values.
        weights: parameters and buffers that hold values beyond its range.
        first_non_finite: the first module whose output is not finite in FP32 either; None where there is none.
        headroom: the largest value that a module returns; None where nothing is known.
        log_probability_error: root mean square difference of log-probabilities from FP32's, over the last dimension of
            `logits`; None without logits, or where they are not finite.
        error: why it could not be run; None where it could.
    """

    number_format: NumberFormat
    overflowing: list[str] = field(default_factory=list)
    operators: dict[str, str] = field(default_factory=dict)
    weights: list[str] = field(default_factory=list)
    first_non_finite: str | None = None
    headroom: Headroom | None = None
    log_probability_error: float | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        return {**asdict(self), "number_format": self.number_format.name}


@dataclass(frozen=True)
class HalfModelEntry(PrecisionEntry):
    """Runs a model whose parameters are of one format, without autocast; values that come in FP32 are cast to it."""

    device_type: str = "cpu"
    emulate: bool = True
    number_format: NumberFormat = FP16_FORMAT

    def context(self, precision: PrecisionMode) -> AbstractContextManager[Any]:
        if precision is PrecisionMode.FP32:
            return EmulatedPrecision(precision.number_format)
        return EmulatedPrecision(self.number_format, autocast=False, casts_mixed=True)


def check_inference(model: nn.Module, batch: Mapping[str, Any]) -> list[InferenceCheck]:
    """What FP16 and BF16 copies of `model` do in inference on `batch`: whether they overflow, where, and how near they are to it.

    The whole of a copy is of the format (`model.half()`), but for modules that transformers keeps in FP32
    (`_keep_in_fp32_modules`). Runs on the CPU, in about six forward passes; `model` stays as it is.

    Args:
        model: on the CPU, of any floating-point dtype.
        batch: arguments of the model by name. Floating-point tensors are cast to the format.

    Returns:
        One for FP16 and one for BF16.
    """
    with torch.no_grad(), without_its_precision(model):
        exact = copy.deepcopy(model).float().eval()
        expected = _log_probabilities(exact, {name: _cast(x, torch.float32) for name, x in batch.items()})
        return [_checked(exact, batch, expected, number_format) for number_format in (FP16_FORMAT, BF16_FORMAT)]


def _checked(
    exact: nn.Module, batch: Mapping[str, Any], expected: Tensor | None, number_format: NumberFormat
) -> InferenceCheck:
    dtype = number_format.dtype
    twin, beyond = half_copy(exact, dtype)
    inputs = {name: _cast(x, dtype) for name, x in batch.items()}
    current = CurrentPrecision(HalfModelEntry(number_format=number_format), PrecisionMode.MIXED)
    found = replay(RecordedForward(twin, (), inputs), current)
    result = InferenceCheck(
        number_format,
        found.overflowing,
        operators_in(found.operators),
        beyond,
        found.first_non_finite,
        error=found.error,
    )
    if found.error is None and found.first_non_finite is None:
        with current(), largest_output(twin, number_format) as largest:
            actual = _log_probabilities(twin, inputs)
        result.headroom = max(largest, key=lambda each: each.amax, default=None)
        if expected is not None and actual is not None:
            error = (actual - expected).square().mean().sqrt().item()
            result.log_probability_error = error if math.isfinite(error) else None
    return result


def half_copy(exact: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, list[str]]:
    """A copy of an FP32 model in half precision, and the names of parameters and buffers that are beyond its range.

    Those stay in FP32, as do modules that transformers keeps in FP32.
    """
    twin = copy.deepcopy(exact).to(dtype)
    kept = {*(getattr(exact, "_keep_in_fp32_modules_strict", None) or ())}
    kept |= {*(getattr(exact, "_keep_in_fp32_modules", None) or ())} if dtype == torch.float16 else set()
    beyond = []
    originals = {**dict(exact.named_parameters()), **dict(exact.named_buffers())}
    for name, tensor in [*twin.named_parameters(), *twin.named_buffers()]:
        original = originals[name].detach()
        if tensor.is_floating_point() and not torch.equal(tensor.isfinite(), original.isfinite()):
            beyond.append(name)  # in FP32 from here on, to see the rest
        if name in beyond[-1:] or kept & set(name.split(".")):
            tensor.data = original.clone()
    return twin, beyond


def operators_in(found: Mapping[str, BadOperator]) -> dict[str, str]:
    """Module → kind of the operator that leaves the format (a product, a sum, a square, a mask), and what is known of it."""
    described = {}
    for module, operator in found.items():
        name = operator.what.split(" ", 1)[0].strip("_,;").removeprefix("i")
        kind = next((kind for kind, names in _KINDS.items() if name in names), "operator")
        described[module] = f"{kind}: {operator.what}"
    return described


_KINDS = {
    "matrix product": {
        "linear",
        "matmul",
        "mm",
        "bmm",
        "addmm",
        "baddbmm",
        "einsum",
        "conv1d",
        "conv2d",
        "conv3d",
        "mv",
    },
    "attention": {"scaled_dot_product_attention", "multi_head_attention_forward"},
    "product": {"mul", "rmul", "multiply", "addcmul", "prod"},
    "sum": {"add", "radd", "sub", "rsub", "sum", "cumsum", "mean"},
    "square": {"pow", "square", "norm", "var", "std"},
    "mask": {"masked_fill", "where", "masked_fill_"},
    "quotient": {"truediv", "div", "rtruediv", "reciprocal", "rsqrt"},
    "exponential": {"exp", "softmax", "logsumexp", "softplus"},
}


@contextmanager
def largest_output(model: nn.Module, number_format: NumberFormat) -> Iterator[list[Headroom]]:
    """Within it, what each module returns, in the order in which they return. One GPU-CPU sync a module."""
    seen: list[Headroom] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            for _, x in float_tensors(output):
                finite = x.detach().float().where(x.detach().isfinite(), 0.0)
                amax = finite.abs().amax().item() if x.numel() else 0.0
                bits = math.log2(number_format.largest / amax) if amax else math.inf
                seen.append(Headroom(name, amax, bits))

        return hook

    handles = [m.register_forward_hook(note(name)) for name, m in model.named_modules() if takes_hooks(m)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def _log_probabilities(model: nn.Module, batch: Mapping[str, Any]) -> Tensor | None:
    logits = getattr(model(**batch), "logits", None)
    return logits.float().log_softmax(-1) if isinstance(logits, Tensor) else None
