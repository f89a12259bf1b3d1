"""`choose_precision`: which modules of a model need a wider format, by measurement instead of by rule of thumb.

Each format runs on a CPU as on a device with units for it, and its error is what it changes of the model's log-probabilities, or
of its loss, against FP32. Then each module computes in the format alone, the rest in FP32, and at the end the other way round: squared errors of modules are about
independent, so what a module adds by itself is what it would save in FP32, without the noise of all others. Modules go to FP32 in
the order of that gain for each of their products, each step is measured, until the bound holds; then what turns out to be
needless goes back. Forward passes alone are looked at: what a loss scale needs says `hf-amp preflight`.
"""

from __future__ import annotations

import copy
import math
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_amp.config import is_real
from hf_amp.emulation import EmulatedPrecision, in_backward
from hf_amp.errors import ConfigError, in_one_line
from hf_amp.events import AmpEvent, EventKind, StepOutcome, join_names
from hf_amp.fallback.diagnosis import joined
from hf_amp.fallback.inference import half_copy
from hf_amp.fallback.module_precision import (
    CurrentPrecision,
    PlanRunner,
    PrecisionEntry,
    holds_shards,
    is_unit,
    without_its_precision,
)
from hf_amp.fallback.operators import is_reentrant
from hf_amp.fallback.plan import PrecisionPlan
from hf_amp.fallback.recorder import ForwardRecorder, RecordedForward
from hf_amp.fallback.replay import float_tensors, nothing_changes, repeat_forward, starts_of
from hf_amp.fallback.sharded import Lockstep
from hf_amp.precision import BF16_FORMAT, EMULATED_FORMATS, FP32_FORMAT, NumberFormat, PrecisionMode
from hf_amp.statistics import all_reduce_max_to_host, is_distributed, to_host_list

if TYPE_CHECKING:
    from hf_amp.session import AmpSession

DEFAULT_SHARE = 0.2
"""Of the error of the format: the bound where none is given."""


# ---- formats -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AuditedFormat:
    """A format as a run would use it.

    Attributes:
        around: what autocast casts to; FP32 for none.
        rounded: what operands of matrix products are rounded to besides, along their last dimension; None for nothing else.
        block: None where every product is; else it is `nn.Linear` alone, with inner and outer dimension multiples of this, which
            is what torchao converts.
    """

    name: str
    around: NumberFormat
    rounded: Callable[[Tensor], Tensor] | None = None
    block: int | None = None

    def converts(self, module: nn.Module) -> bool:
        """Whether `module` is one of the layers that are converted, where not all are."""
        sizes = (module.in_features, module.out_features) if isinstance(module, nn.Linear) else ()
        return bool(self.block and sizes) and all(size % cast(int, self.block) == 0 for size in sizes)


def _rounded_to_tf32(x: Tensor) -> Tensor:
    """FP32 with 10 bits of mantissa, to nearest, ties away from zero. Source: CUDA's `cvt.rna.tf32.f32`."""
    bits = x.contiguous().view(torch.int32) + (1 << 12)
    return (bits & -(1 << 13)).view(torch.float32).where(x.isfinite(), x)


def torchao_formats() -> list[AuditedFormat]:
    """FP8 with a scale for each tensor, MXFP8 and NVFP4, by torchao's own casts; operands of `nn.Linear`, in a BF16 run.

    Sources: `torchao.float8` (dynamic, tensorwise, E4M3: the recipe that accelerate runs), `torchao.prototype.mx_formats`
    (blocks of 32 and 16 along the dimension that is summed over; powers of two rounded up for MXFP8, a second scale for each tensor
    for NVFP4), as its inference configurations have it.

    Raises:
        ConfigError: torchao is not installed.
    """
    if find_spec("torchao") is None:
        raise ConfigError(f"{', '.join(SCALED_FORMATS)} are emulated by torchao: pip install torchao.")
    from torchao.float8.float8_linear import hp_tensor_to_float8_dynamic
    from torchao.float8.float8_training_tensor import LinearMMConfig
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    def nvfp4(x: Any) -> Any:  # without a scale of zero for a tensor of zeros
        return NVFP4Tensor.to_nvfp4(
            x.contiguous(), 16, per_tensor_amax_to_scale(x.abs().amax().clamp(2**-100))
        ).dequantize()

    fp8, recipe = torch.float8_e4m3fn, LinearMMConfig()
    casts: list[tuple[int, Callable[[Any], Any]]] = [
        (16, lambda x: hp_tensor_to_float8_dynamic(x, fp8, recipe).to_original_precision()),
        (32, lambda x: MXTensor.to_mx(x.contiguous(), fp8, 32, ScaleCalculationMode.RCEIL).dequantize(x.dtype)),
        (16, nvfp4),
    ]
    return [AuditedFormat(n, BF16_FORMAT, to, block) for n, (block, to) in zip(SCALED_FORMATS, casts, strict=True)]


SCALED_FORMATS = ("scaled FP8", "MXFP8", "NVFP4")
_TF32 = AuditedFormat("TF32", FP32_FORMAT, _rounded_to_tf32)
_PLAIN = {each.name: AuditedFormat(each.name, each) for each in EMULATED_FORMATS}


class RoundedOperands(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, matrix products of this thread have operands that are rounded by a function; the innermost one acts.

    Args:
        rounded: rounds along the last dimension; None for no rounding.
    """

    _of_thread: ClassVar[threading.local] = threading.local()
    _OPERANDS: ClassVar[dict[str, tuple[int, ...]]] = {
        "aten::mm": (0, 1), "aten::bmm": (0, 1), "aten::addmm": (1, 2), "aten::baddbmm": (1, 2), "aten::convolution": (0, 1),
        "aten::_scaled_dot_product_flash_attention_for_cpu": (0, 1, 2),
    }  # fmt: skip

    def __init__(self, rounded: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rounded = rounded

    def __enter__(self) -> Any:
        self._outer = self._of_thread.__dict__.get("innermost")
        self._of_thread.innermost = self
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *exception: Any) -> None:
        self._of_thread.innermost = self._outer
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        operands = self._OPERANDS.get(name, ())
        if self._rounded is None or self._of_thread.innermost is not self or not operands:
            return func(*args, **(kwargs or {}))
        given = list(args)
        for place in operands:
            second_of_a_product = place == operands[1] and name.endswith("mm")  # summed over along its rows
            x = given[place].mT if second_of_a_product else given[place]
            given[place] = self._rounded(x).mT if second_of_a_product else self._rounded(x)
        return func(*given, **(kwargs or {}))


@dataclass(frozen=True)
class _AuditEntry(PrecisionEntry):
    """MIXED stands for the format, BF16 for what is around it, FP32 for FP32, each by emulation."""

    device_type: str = "cpu"
    emulate: bool = True
    audited: AuditedFormat = _TF32
    inference: bool = False

    def context(self, precision: PrecisionMode) -> AbstractContextManager[Any]:
        rounded = self.audited.rounded if precision is PrecisionMode.MIXED else None
        rounding = nullcontext() if self.audited.rounded is None else RoundedOperands(rounded)
        if precision is PrecisionMode.FP32:
            return _nested(EmulatedPrecision(FP32_FORMAT), rounding)
        around = EmulatedPrecision(self.audited.around, autocast=not self.inference, casts_mixed=self.inference)
        return _nested(around, rounding)


@contextmanager
def _nested(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    with outer, inner:
        yield


# ---- results -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrecisionError:
    """What a format changes, against FP32: of log-probabilities in nats, or of losses.

    Attributes:
        rms: root mean square over the tokens (or rows); inf where something is not finite, or the model raises in that format.
        largest: the largest magnitude.
    """

    rms: float
    largest: float


@dataclass(frozen=True)
class ModuleError:
    """One module computing in the format, all others in FP32; and the other way round.

    Attributes:
        products: its share of the model's multiply-accumulates, with those inside of it.
        rms: the error that it makes alone.
        widened: the other way round, the error that is left where it alone is in FP32 and all others are in the format; NaN where
            that was not measured.
    """

    module: str
    products: float
    rms: float
    widened: float = math.nan


@dataclass(frozen=True)
class CurvePoint:
    """After one more module is in FP32.

    Attributes:
        module: which; "" for the start, where none is, and for the end, where needless ones are back in the format.
        half_products: share of multiply-accumulates that are not in FP32; of a format of torchao's, some are in BF16.
        rms: the error.
        largest: its largest magnitude.
    """

    module: str
    half_products: float
    rms: float
    largest: float


@dataclass
class PrecisionTable:
    """What was measured.

    Attributes:
        metric: "logprob" or "loss".
        tokens: how many log-probabilities, or losses, the errors are over.
        inference: whether half-precision copies were asked for, without autocast.
        max_error: the bound on the root mean square.
        formats: name of a format → its error where the whole model is in it.
        missing: which formats cannot be emulated here, and why; "" where all can.
        number_format: the format of the plan; "FP32" where none met the bound.
        modules: in the order of their gain for each product.
        curve: from no module in FP32 to the plan.
        settings: tool → its settings for this plan.
    """

    metric: str
    tokens: int
    inference: bool
    max_error: float
    formats: dict[str, PrecisionError] = field(default_factory=dict)
    missing: str = ""
    number_format: str = "FP32"
    modules: list[ModuleError] = field(default_factory=list)
    curve: list[CurvePoint] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def chosen(self) -> CurvePoint:
        """The plan's own point."""
        return self.curve[-1]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON; None for what is not finite."""
        return asdict(self, dict_factory=lambda items: {k: None if _is_not_finite(v) else v for k, v in items})


def _is_not_finite(x: Any) -> bool:
    return isinstance(x, float) and not math.isfinite(x)


class _Search(NamedTuple):
    """What one format needs."""

    audited: AuditedFormat
    modules: list[ModuleError]
    curve: list[CurvePoint]
    wide: list[str]
    met: bool


# ---- measuring ---------------------------------------------------------------------------------------------------


def choose_precision(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    metric: Literal["logprob", "loss"] = "logprob",
    max_error: float | None = None,
    number_format: str | None = None,
    inference: bool = False,
) -> tuple[PrecisionPlan, PrecisionTable]:
    """The smallest set of modules in FP32 with which a half-precision run of `model` meets a bound on its error.

    Runs on the CPU on a copy in FP32, in about three forward passes a module; `model` stays as it is. GPU-CPU syncs: many.

    Args:
        model: any module whose output has `logits`, or `loss` for that metric; on any device, of any floating-point dtype, also one
            that torchao has converted to FP8, in the middle of a run.
        batch: its arguments by name, as real as can be; shapes as the model takes them.
        metric: "logprob" for the log-probability of each token that follows (of `labels` but -100, where the model is no
            causal one; of all classes where there are none), which is what trainer and rollout of RL differ by; "loss" for the
            loss of each row.
        max_error: the largest root mean square error allowed; None for a fifth of that of `number_format`, or BF16.
        number_format: "FP16", "BF16", "FP8 E4M3", "FP8 E5M2", "scaled FP8", "MXFP8" or "NVFP4", in any case; None for FP16 or
            BF16, whichever leaves fewer products in FP32.
        inference: half-precision copies of the parameters without autocast, as vLLM runs them, in place of autocast over FP32
            ones, as training does. FP8 without a scale is left out there.

    Returns:
        The plan, for `MixedPrecisionConfig(plan=...)`, and what was measured. FP32 alone where no format meets the bound. Of a
        format narrower than half, the plan says what is around it, BF16, and `fp32_modules` what is left out of it.

    Raises:
        ConfigError: an argument is wrong, the model cannot be run, gives nothing of that metric, or is not finite in FP32;
            torchao is missing.
    """
    number_format = _checked_format(number_format)
    _check_arguments(metric, max_error)
    with torch.no_grad(), without_its_precision(model):
        audit = _Audit(model, batch, metric, inference)
        table = PrecisionTable(metric, audit.exact.numel(), inference, math.nan)
        formats = _formats(table, needs_torchao=number_format in SCALED_FORMATS, inference=inference)
        if number_format not in (None, *formats):
            raise ConfigError(
                f"number_format={number_format!r} with inference=True: use FP16 or BF16, or leave one out."
            )
        table.formats = {"FP32": PrecisionError(0.0, 0.0)}
        table.formats |= {each.name: audit.of_format(each).error(()) for each in formats.values()}
        candidates = [formats[name] for name in ([number_format] if number_format else ["FP16", "BF16"])]
        finite = [rms for name in (candidates[-1].name, "BF16") if math.isfinite(rms := table.formats[name].rms)]
        table.max_error = max_error if max_error is not None else DEFAULT_SHARE * (finite or [0.0])[0]
        found = _best_search(audit, candidates, table)
        in_format = audit.of_format(found.audited)
        table.modules = [replace(each, widened=in_format.error([each.module]).rms) for each in found.modules]
        table.curve = found.curve
        if not found.met:
            return PrecisionPlan(PrecisionMode.FP32), table
        table.number_format = found.audited.name
        table.settings = _settings(audit.model, found, inference)
    mode = PrecisionMode.MIXED if found.audited.name == "FP16" else PrecisionMode.BF16
    wide = MappingProxyType(dict.fromkeys(found.wide, PrecisionMode.FP32))
    return PrecisionPlan(mode, wide), table


def scaled_format_errors(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, PrecisionError]:
    """Name of each format of torchao's → its error of log-probabilities; arguments and errors of `choose_precision`."""
    with torch.no_grad(), without_its_precision(model):
        audit = _Audit(model, batch, "logprob", inference=False)
        return {audited.name: audit.of_format(audited).error(()) for audited in torchao_formats()}


def errors_by_module(
    model: nn.Module,
    batch: Mapping[str, Any],
    change: Callable[[nn.Module], Any],
    *,
    metric: Literal["logprob", "loss"] = "loss",
) -> list[ModuleError]:
    """What something that changes modules costs, such as a quantisation, module by module; the dearest first.

    Runs on the CPU on two copies in FP32, in two forward passes a module that is changed; `model` stays as it is. GPU-CPU syncs: many.

        errors_by_module(model, batch, lambda m: quantize_(m, QATConfig(base, step="prepare")))

    Args:
        model, batch, metric: as for `choose_precision`.
        change: is given a copy, and changes or replaces modules of it in place.

    Returns:
        `rms` with one module changed alone, `widened` with all changed but that one, for each innermost module that was changed.

    Raises:
        ConfigError: as for `choose_precision`.
    """
    _check_arguments(metric, None)
    with torch.no_grad(), without_its_precision(model):
        audit = _Audit(model, batch, metric, inference=False)
        changed = copy.deepcopy(audit.model)
        change(changed)
        inner = [name for name, module in audit.model.named_modules() if name and not any(module.children())]
        names = [n for n in inner if _differ(audit.model.get_submodule(n), changed.get_submodule(n))]
        pairs = {name: (audit.model.get_submodule(name), changed.get_submodule(name)) for name in names}

        def measured(name: str) -> ModuleError:
            (plain, other), errors = pairs[name], []
            for held, given, back in ((audit.model, other, plain), (changed, plain, other)):
                held.set_submodule(name, given)
                errors.append(_error(audit.outcomes(held, torch.float32), audit.exact).rms)
                held.set_submodule(name, back)
            return ModuleError(name, audit.products.get(name, 0) / audit.total, *errors)

        return sorted(map(measured, names), key=lambda each: -each.rms)


def _differ(a: nn.Module, b: nn.Module) -> bool:
    """In their kind, or in what they hold."""
    before, after = a.state_dict(), b.state_dict()
    same = type(a) is type(b) and before.keys() == after.keys()
    return not (same and all(type(x) is type(after[k]) and torch.equal(x, after[k]) for k, x in before.items()))


def _checked_format(given: str | None) -> str | None:
    """As it is spelt here."""
    known = {name.upper(): name for name in (*_PLAIN, *SCALED_FORMATS)}
    if given is not None and str(given).upper() not in known:
        raise ConfigError(f"choose_precision(number_format={given!r}): it must be one of {', '.join(known.values())}.")
    return None if given is None else known[str(given).upper()]


def _check_arguments(metric: str, max_error: float | None) -> None:
    if metric not in ("logprob", "loss"):
        raise ConfigError(f"choose_precision(metric={metric!r}): metric must be one of logprob, loss.")
    if max_error is not None and not (is_real(max_error) and max_error > 0):
        raise ConfigError(f"choose_precision(max_error={max_error!r}): max_error must be a positive finite number.")


def _formats(table: PrecisionTable, needs_torchao: bool, inference: bool) -> dict[str, AuditedFormat]:
    """The formats that can be emulated here, narrower than FP32."""
    plain = [each for each in _PLAIN.values() if not (inference and each.name.startswith("FP8"))]
    try:
        scaled = torchao_formats()
    except ConfigError as error:
        if needs_torchao:
            raise
        scaled = []
        table.missing = str(error)
    return {each.name: each for each in (_TF32, *plain, *scaled)}


class _Audit:
    """An FP32 copy of a model, a batch, and what it gives in FP32.

    Attributes:
        exact: log-probabilities or losses in FP32; FP64, of shape [tokens].
        products: module → its multiply-accumulates, with those inside of it; without the model itself.
        total: the model's.
    """

    def __init__(self, model: nn.Module, batch: Mapping[str, Any], metric: str, inference: bool) -> None:
        if not isinstance(batch, Mapping):
            raise ConfigError(
                f"choose_precision: the batch is a {type(batch).__name__}; pass the model's arguments by name, in a dict."
            )
        model = getattr(model, "_orig_mod", model)  # compiled, it would be compiled anew for every module
        self.model = copy.deepcopy(model)
        for module in self.model.modules():  # converted to FP8 by torchao, whose class casts in its forward pass
            if is_float8(module):
                module.__class__ = nn.Linear
        self.model = self.model.to("cpu", torch.float32).eval().requires_grad_(False)
        self._batch = {name: _cast(x, torch.float32) for name, x in batch.items()}
        self._metric, self._inference = metric, inference
        self.products, self.total = self._counted_products()
        self.exact = self.outcomes(self.model, torch.float32)
        if not self.exact.numel():
            raise ConfigError(
                "choose_precision: nothing to measure; pass rows of two tokens and more, and labels other than -100."
            )
        if not bool(self.exact.isfinite().all()):
            raise ConfigError("choose_precision: not finite in FP32 either; fix the model or the batch first.")

    def outcomes(self, model: nn.Module, dtype: torch.dtype) -> Tensor:
        """What the metric is of; FP64, of shape [tokens]."""
        batch = {name: _cast(x, dtype) for name, x in self._batch.items()}
        if self._metric == "loss":
            return torch.stack([_loss_of(model(**rows)) for rows in _rows(batch)])
        return _log_probabilities(model, model(**batch), batch)

    def of_format(self, audited: AuditedFormat) -> _FormatAudit:
        """The same in one format."""
        return _FormatAudit(self, audited, self._inference)

    def _counted_products(self) -> tuple[dict[str, int], int]:
        """By PyTorch's FlopCounterMode; two floating-point operations are one product."""
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode

        # A CPU's fused attention is not counted.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            try:
                self.model(**self._batch)
            except Exception as error:  # whatever the model raises on this batch
                raise ConfigError(
                    f"choose_precision: {type(self.model).__name__} cannot be run on {', '.join(self._batch)} "
                    f"({in_one_line(error)}); pass its arguments by name, as it takes them."
                ) from error
        counts = {name: sum(of.values()) // 2 for name, of in counter.get_flop_counts().items()}
        root, names = type(self.model).__name__, [name for name, _ in self.model.named_modules() if name]
        found = {name: count for name in names if (count := counts.get(f"{root}.{name}"))}
        return found, max(1, counts.get("Global", 0))


class _FormatAudit:
    """An `_Audit` in one format."""

    def __init__(self, audit: _Audit, audited: AuditedFormat, inference: bool) -> None:
        self.audit, self.audited = audit, audited
        self._dtype = dtype = audited.around.dtype if inference else torch.float32
        self._model = audit.model if dtype == torch.float32 else half_copy(audit.model, dtype)[0]
        self._converted = [n for n, m in self._model.named_modules() if audited.converts(m)]
        self._runner = PlanRunner(_AuditEntry(audited=audited, inference=inference), PrecisionMode.FP32)
        self._runner.register_model(self._model)

    def error(self, names: Collection[str], alone: bool = False) -> PrecisionError:
        """With the modules of these names in FP32, and the rest in the format; `alone`: the other way round."""
        around = PrecisionMode.BF16 if self.audited.block else PrecisionMode.MIXED
        default, other = (PrecisionMode.FP32, around) if alone else (around, PrecisionMode.FP32)
        converted = {each: PrecisionMode.MIXED for each in self._converted if _inside(each, names) == alone}
        return self._measured(PrecisionPlan(default, {**dict.fromkeys(names, other), **converted}))

    def _measured(self, plan: PrecisionPlan) -> PrecisionError:
        try:
            self._runner.apply(plan)
            with self._runner.current():
                found = self.audit.outcomes(self._model, self._dtype)
        except RuntimeError:  # as where a mask is made for one dtype and added to another, which a device refuses too
            return PrecisionError(math.inf, math.inf)
        finally:
            self._runner.remove()
        return _error(found, self.audit.exact)


def _error(found: Tensor, exact: Tensor) -> PrecisionError:
    difference = (found - exact).abs()
    if not bool(difference.isfinite().all()):
        return PrecisionError(math.inf, math.inf)
    return PrecisionError(difference.square().mean().sqrt().item(), difference.amax().item())


def _inside(name: str, of: Collection[str]) -> bool:
    return any(name == held or name.startswith(f"{held}.") for held in of)


def _cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to("cpu", dtype if x.is_floating_point() else x.dtype) if isinstance(x, Tensor) else x


def _of(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _loss_of(output: Any) -> Tensor:
    loss = _of(output, "loss")
    if loss is None:
        raise ConfigError(
            "choose_precision: the model returns no loss; put labels into the batch, or use metric='logprob'."
        )
    return torch.as_tensor(loss).double().mean()


def _rows(batch: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Row by row, where every argument has as many; else all at once."""
    sizes = {len(x) if isinstance(x, Tensor) and x.dim() else 0 for x in batch.values()}
    (size,) = sizes if len(sizes) == 1 else (0,)
    return [{name: x[row : row + 1] for name, x in batch.items()} for row in range(size)] or [batch]


def _log_probabilities(model: nn.Module, output: Any, batch: Mapping[str, Any]) -> Tensor:
    """Of the tokens or classes that are asked for, in FP64, flat."""
    logits = _of(output, "logits")
    if not isinstance(logits, Tensor):
        raise ConfigError("choose_precision: the model returns no logits; use metric='loss', with labels in the batch.")
    found = logits.float().log_softmax(-1)
    tokens, labels, mask = (batch.get(name) for name in ("input_ids", "labels", "attention_mask"))
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    generates = bool(getattr(model, "can_generate", lambda: False)())
    if generates and not encoder_decoder and isinstance(tokens, Tensor) and found.shape[:-1] == tokens.shape:
        asked = tokens if labels is None else labels
        asked = asked if mask is None or mask.shape != asked.shape else asked.masked_fill(mask == 0, -100)
        found, asked = found[:, :-1], asked[:, 1:]
    else:
        asked = labels if labels is not None else batch.get("decoder_input_ids")
    if not isinstance(asked, Tensor) or asked.shape != found.shape[:-1] or asked.is_floating_point():
        return found.double().flatten()
    kept = asked >= 0
    return found[kept].gather(-1, asked[kept].long().unsqueeze(-1)).double().flatten()


# ---- choosing ----------------------------------------------------------------------------------------------------


def _best_search(audit: _Audit, candidates: Sequence[AuditedFormat], table: PrecisionTable) -> _Search:
    """The one with the most products left in its format; the first that needs nothing ends the search."""
    done: list[_Search] = []
    for audited in candidates:
        done.append(_search(audit.of_format(audited), table.formats[audited.name], table.max_error))
        if done[-1].met and not done[-1].wide:
            break
    return max(done, key=lambda each: (each.met, each.curve[-1].half_products if each.met else -each.curve[-1].rms))


def _search(audit: _FormatAudit, whole: PrecisionError, bound: float) -> _Search:
    """Greedy by gain for each product; the gain of a module is the squared error that it makes alone."""
    products, total = audit.audit.products, audit.audit.total
    floor = audit.error((), alone=True).rms ** 2  # of rounded parameters, which no arithmetic cures; 0 in training
    alone = {name: max(0.0, audit.error([name], alone=True).rms ** 2 - floor) for name in products}
    overflowing = [name for name, square in alone.items() if math.isinf(square)]
    wide: list[str] = []
    error, curve, left = whole, [CurvePoint("", 1.0, whole.rms, whole.largest)], set(products)

    def gain(name: str) -> float:
        if name in overflowing:  # because of what is inside of it, or by itself
            inside = [other for other in overflowing if other != name and _inside(other, [name])]
            by_itself = not inside or (math.isinf(error.rms) and all(_inside(other, wide) for other in inside))
            return math.inf if by_itself else 0.0
        held = [other for other in wide if _inside(other, [name])]
        saved = alone[name] - sum(alone[other] for other in held)
        return saved / max(1, products[name] - sum(products[other] for other in held))

    def add_point(module: str) -> None:
        share = 1 - sum(products[name] for name in wide) / total
        curve.append(CurvePoint(module, share, error.rms, error.largest))

    while error.rms > bound and left:
        name = max(sorted(left), key=gain)
        left.discard(name)
        if gain(name) <= 0 or _inside(name, wide):
            continue
        tried = [other for other in wide if not _inside(other, [name])] + [name]
        found = audit.error(tried)
        if found.rms < error.rms or math.isinf(error.rms):
            wide, error = tried, found
            add_point(name)
    taken = len(wide)
    for name in sorted(wide, key=lambda each: (-products[each], alone[each])) if error.rms <= bound else ():
        kept = [other for other in wide if other != name]
        found = audit.error(kept)
        if found.rms <= bound:
            wide, error = kept, found
    if len(wide) < taken:
        add_point("")
    order = sorted(products, key=lambda name: -alone[name] / products[name])
    modules = [ModuleError(name, products[name] / total, math.sqrt(alone[name])) for name in order]
    met = error.rms <= bound and sum(products[name] for name in wide) < total
    return _Search(audit.audited, modules, curve, [name for name in products if name in wide], met)


# ---- in an FP8 run -----------------------------------------------------------------------------------------------

FIRST_TRIED, STEPS_TRIED = 2, 3
"""The first step that an FP8 run is looked into after (in the very first no gradient comes through a head or adapter of zeros), and how
many are tried at most, where one cannot be repeated."""
TRIED_ALONE = 3
"""Layers that are tried one by one: those with the largest estimates."""
SHARE_OF_ROUNDING = 1.0
"""A layer is tried where what it loses to the range costs the loss more than this times what rounding costs in all layers together.
Measured: at most 0.15 in models of six families, 2 to 17 where one weight is large (`tests/peers/test_fp8_damage.py`)."""
ELEMENTS_COMPARED = 2**22
"""Of each output, in whole rows that are evenly spaced."""
ROUNDOFF = torch.finfo(torch.float8_e4m3fn).eps / 2
"""What rounding to E4M3 changes of a number at most. A layer whose rounding alone moves the outputs by more is to blame for it."""
_ROUNDING = 2 * torch.finfo(torch.float8_e4m3fn).eps ** 2 / (32 * math.log(2))
"""Expected square of the relative error of a product of two E4M3 operands that are inside of its range. Source: an error that is even
within half a spacing, of significands whose logarithm is even, gives eps^2 / 12 * 3 / (8 ln 2) for each."""
_OURS = frozenset(["hf_amp", "accelerate", "peft", "torch", "torchao", "transformers"])
_ASK = "hf_amp.choose_precision(model, batch, number_format='scaled FP8') measures every layer."


def is_float8(module: nn.Module) -> bool:
    """Whether torchao runs `module` in FP8: its class is not public."""
    return type(module).__name__ == "Float8Linear" and isinstance(module, nn.Linear)


def has_foreign_hooks(model: nn.Module) -> bool:
    """Whether modules have hooks of others than the libraries that train it, which would see passes that are no training."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = [hook for module in model.modules() for kind in kinds for hook in getattr(module, kind).values()]
    return any(str(getattr(hook, "func", hook).__module__).partition(".")[0] not in _OURS for hook in hooks)


def watch_float8(session: AmpSession, model: nn.Module, recorder: ForwardRecorder, runner: PlanRunner) -> None:
    """Has `session` name, once, the layers of `model` that FP8 by torchao does damage in; nothing where it has none in FP8."""
    if session.config.enable_monitoring and any(map(is_float8, model.modules())):
        check = Float8Check(session, model, recorder, runner)
        session.scaler.observers.append(check)
        session.patches.on_undo(check.remove)


class Float8Check:
    """An observer of the scaler that looks, after one early applied step, at what FP8 does in it, and is gone then.

    It repeats the step's newest forward pass: 3 passes, and up to 4 more where there is something to try. Buffers, random state and gradients
    stay as they are. Ranks that share parameters go in lockstep; others look each at its own batch. GPU-CPU syncs: many, in this one step.

    Args:
        session: takes the event and the figure.
        model: with FP8 layers; not kept alive.
        recorder, runner: of the session.
    """

    def __init__(self, session: AmpSession, model: nn.Module, recorder: ForwardRecorder, runner: PlanRunner) -> None:
        self._session, self._recorder, self._runner = session, recorder, runner
        self._model = weakref.ref(model)
        self._left = 1 if runner.sharded else STEPS_TRIED  # a rank that tries again must not be alone

    def __call__(self, outcome: StepOutcome, optimizer: torch.optim.Optimizer) -> None:
        """After each step until then."""
        if outcome.attempt < FIRST_TRIED or not outcome.applied:
            return
        forwards = [each for each in self._recorder.forwards_of(outcome.attempt) if each.model is self._model()]
        self._left -= 1
        self._recorder.is_paused = True
        try:
            with Lockstep(self._runner.device, forwards, _nothing).entered() if self._runner.sharded else nullcontext():
                found = self._found(forwards, outcome.scale)
        except (
            Exception
        ) as error:  # out of memory, parameters in shards, or whatever the model raises: training goes on
            if self._left:
                return
            sentence = f"what FP8 does to single layers could not be measured ({in_one_line(error)}). {_ASK}"
            found = Float8Damage((), sentence, {})
        finally:
            self._recorder.is_paused = False
        self.remove()
        self._session.throughput.pause()
        self._session.monitor.fp8_output_error = found.figures.get("fp8_output_error")
        kind = EventKind.FP8_DAMAGE if found.damaging else EventKind.FP8_MEASURED
        event = AmpEvent(self._session.newest_step, kind, modules=found.damaging, message=found.sentence)
        self._session.record(replace(event, figures=found.figures))

    def _found(self, forwards: Sequence[RecordedForward], scale: float) -> Float8Damage:
        if not forwards:
            raise RuntimeError("no forward pass of the step was noted")
        if has_foreign_hooks(forwards[-1].model):
            raise RuntimeError("its modules have hooks, which would see passes that are no training")
        prefix, left_out = self._runner.name_of(forwards[-1].model), self._session.config.fp32_modules
        return float8_damage(forwards[-1], self._runner.current, scale, prefix, left_out)

    def remove(self) -> None:
        """Ends it. Harmless when called again."""
        scaler = self._session.scaler
        scaler.observers = [each for each in scaler.observers if each is not self]


class Float8Damage(NamedTuple):
    """What FP8 by torchao does to one forward pass.

    Attributes:
        damaging: names of the layers that lose more than rounding, confirmed by trials; the worst first.
        sentence: what was found, for people, with what to do.
        figures: `fp8_output_error`, as in the catalogue of metrics, and `fp8_loss_error`, which FP8 adds to the loss.
        passes: forward and backward passes that it took.
    """

    damaging: tuple[str, ...]
    sentence: str
    figures: dict[str, float]
    passes: int = 0


def float8_damage(
    forward: RecordedForward,
    current: CurrentPrecision,
    scale: float = 1.0,
    prefix: str = "",
    left_out: Sequence[str] = (),
) -> Float8Damage:
    """Which layers that torchao has converted to FP8 do more than their part in one forward pass, and what that is.

    A backward pass estimates, for all layers at once, what each one's error does to the loss, and what rounding to E4M3 would do to it if
    all values were inside of the range. A layer in which the range costs more than all rounding together (`SHARE_OF_ROUNDING`) runs
    alone in FP8, the rest in the wide precision of the run; so does one whose rounding is most of all. It is confirmed
    where that moves the outputs by more than all layers do that are under no suspicion, and rounding by more than `ROUNDOFF`.
    Many GPU-CPU syncs; nothing of the run changes.

    Args:
        forward: a recorded pass of a model with such layers.
        current: the precision of the run around FP8.
        scale: that the loss was multiplied by.
        prefix: what stands before the names of the model's modules.
        left_out: `fp32_modules` so far.

    Raises:
        RuntimeError: the pass cannot be repeated, or what the loss gives to the outputs was not kept; and whatever the model raises.
    """
    trials = _Float8Trials(forward, current, scale)
    effects, narrow = trials.effects()
    exact = trials.outcome(trials.layers)
    names = {each: joined(prefix, name) for each, name in trials.layers.items()}
    error, worst = trials.apart(narrow, exact), max(effects, key=lambda each: effects[each][0])
    suspects, loses_range = _suspects(effects)
    if not loses_range and error <= ROUNDOFF:
        suspects = []
    tried = suspects[:TRIED_ALONE]
    alone = {each: trials.apart(trials.outcome(trials.layers.keys() - {each}), exact) for each in tried}
    without = trials.outcome(suspects) if suspects else narrow
    others = trials.apart(without, exact)
    enough = max(others, 0.0 if loses_range else ROUNDOFF)
    shares = {names[each]: alone[each] for each in sorted(alone, key=lambda x: -alone[x]) if alone[each] > enough}
    figures, loss = {"fp8_output_error": error}, ""
    if narrow.loss is not None and exact.loss is not None and without.loss is not None:
        figures["fp8_loss_error"] = narrow.loss - exact.loss
        loss = (
            f" The loss of the batch is {narrow.loss:.4g} in FP8, {exact.loss:.4g} in {current.mode.number_format.name}"
        )
        loss += f", {without.loss:.4g} with {'it' if len(suspects) == 1 else 'them'} left out." if shares else "."
    moved = f"FP8 moves the outputs by {error:.2%} of their size"
    if not suspects:
        sentence = f"{moved}, in {len(names)} layers, by rounding; most of it may come from {names[worst]}.{loss}"
    elif not shares:
        which = join_names([names[each] for each in suspects])
        sentence = f"{moved}; {which} may cost more than the others, but alone in FP8 moves them by less ({others:.2%}).{loss} {_ASK}"
    else:
        why = (
            "one scale for a whole tensor leaves no bits for small values"
            if loses_range
            else "its rounding is made larger"
        )
        each_alone = ", ".join(f"{name} by {share:.2%}" for name, share in shares.items())
        untried = len(suspects) - len(alone)
        more = f" {untried} more may need it, which were not tried alone: {_ASK}" if untried else ""
        rest = "all layers under no suspicion" if untried else "all other layers"
        sentence = (
            f"{moved}, because {why} there: alone in FP8, {each_alone}; {rest} together by {others:.2%}.{loss} "
            f"Start again with fp32_modules={[*left_out, *shares]}.{more}"
        )
    return Float8Damage(tuple(shares), sentence, figures, trials.passes)


def _suspects(effects: Mapping[nn.Module, tuple[float, float]]) -> tuple[list[nn.Module], bool]:
    """Layers that lose to the range what is worth a trial, the worst first, and True; else the one whose rounding is most of all."""
    made, rounding = (math.hypot(*each) for each in zip(*effects.values(), strict=True))
    lost = {each: math.sqrt(max(0.0, own**2 - expected**2)) for each, (own, expected) in effects.items()}
    if not rounding or not math.isfinite(made + rounding):
        raise RuntimeError("no gradient, or none that is finite, comes to its FP8 layers")
    suspects = sorted((each for each in lost if lost[each] > SHARE_OF_ROUNDING * rounding), key=lambda x: -lost[x])
    return suspects or [each for each, (own, _) in effects.items() if 2 * own**2 > made**2], bool(suspects)


class _Outcome(NamedTuple):
    """Of each output some whole rows, FP32, of shape [rows, size]; and the loss, where the model returns one."""

    outputs: list[Tensor]
    loss: float | None


class _Float8Trials:
    """One recorded forward pass, with some of its FP8 layers in the wide precision of the run.

    Attributes:
        layers: FP8 layer → its name in the model.
        passes: forward and backward passes so far.
    """

    def __init__(self, forward: RecordedForward, current: CurrentPrecision, scale: float) -> None:
        self._forward, self._current, self._scale = forward, current, scale
        self.layers = {module: name for name, module in forward.model.named_modules() if is_float8(module)}
        gathers_fp8 = any(cast(Any, layer).config.enable_fsdp_float8_all_gather for layer in self.layers)
        if gathers_fp8 and holds_shards(forward.model):
            raise RuntimeError("FSDP gathers its weights in FP8, but with enable_fsdp_float8_all_gather=False")
        self.passes = 0
        self._paths: list[str] = []

    def effects(self) -> tuple[dict[nn.Module, tuple[float, float]], _Outcome]:
        """Layer → what its error is expected to do to the loss, and what rounding alone is; and the outcome. Two passes.

        Root of the sum of squares, over the elements of its output, of error times gradient: the standard deviation of the change, to
        first order, for errors of random signs.
        """
        self.passes += 2
        found: dict[nn.Module, list[Tensor]] = {}
        anchor = torch.zeros((), requires_grad=True)  # where a backward ends that makes no gradient of a parameter
        with ExitStack() as stack:
            stack.enter_context(nothing_changes(self._forward.model, gradients=True))
            self._change_outputs(
                stack, self.layers, lambda layer, x, y: _noting_effect(y, x, anchor, layer, self._current, found)
            )
            with self._current() as precision:
                output, _ = repeat_forward(self._forward)
            stack.enter_context(in_backward(precision))
            starts, is_probe, *_ = starts_of(output, self._forward, 1.0, self._scale)
            if not starts or is_probe:
                raise RuntimeError(
                    "the loss is made outside of the model, and what it gives to the outputs was not kept"
                )
            losses, seeds = zip(*starts, strict=True)
            if is_reentrant(losses):  # no gradient comes to the anchor from what is checkpointed
                raise RuntimeError("gradient checkpointing hides its layers, but not with use_reentrant=False")
            torch.autograd.grad(losses, [anchor], seeds, allow_unused=True)
            known = {path: x for path, x in float_tensors(output) if x.requires_grad}
            self._paths = [path for path, x in known.items() if x.dim()] or list(known)
            sums = to_host_list(x for pair in found.values() for x in pair)
        sums = self._agreed(sums)
        pairs = zip(found, sums[::2], sums[1::2], strict=True)
        return {layer: (math.sqrt(made), math.sqrt(rounding)) for layer, made, rounding in pairs}, self._seen(output)

    def _agreed(self, values: list[float]) -> list[float]:
        """The largest on any rank, where they go in lockstep: what is tried next must be the same on all."""
        if (lockstep := Lockstep.now()) is None or not is_distributed():
            return values
        lockstep.anyone(False)  # all have come to this place
        return all_reduce_max_to_host(torch.tensor(values, device=next(self._forward.model.parameters()).device))

    def outcome(self, wide: Collection[nn.Module]) -> _Outcome:
        """With `wide` in the wide precision. One forward pass."""
        self.passes += 1
        with ExitStack() as stack:
            stack.enter_context(nothing_changes(self._forward.model))
            self._change_outputs(stack, wide, lambda layer, x, y: nn.Linear.forward(layer, x))
            with self._current():
                return self._seen(repeat_forward(self._forward)[0])

    def apart(self, outcome: _Outcome, exact: _Outcome) -> float:
        """Root mean square of the differences, as a share of `exact`'s own size; without what a row has in common, as softmax is."""
        shares = []
        for x, y in zip(outcome.outputs, exact.outputs, strict=True):
            centred = [each - each.mean(-1, keepdim=True) if y.shape[-1] > 1 else each for each in (x - y, y)]
            off, size = to_host_list(each.square().mean() for each in centred)
            shares.append(off / max(size, 1e-30))
        return self._agreed([math.sqrt(sum(shares) / len(shares))])[0]

    def _change_outputs(self, stack: ExitStack, layers: Collection[nn.Module], change: Callable[..., Any]) -> None:
        def hook(layer: nn.Module, arguments: Any, options: Any, output: Any) -> Any:
            return change(layer, arguments[0] if arguments else options["input"], output)

        for layer in layers:
            # Before FSDP lets go of what it has gathered.
            handle = layer.register_forward_hook(hook, with_kwargs=True, prepend=is_unit(layer))
            stack.callback(handle.remove)

    def _seen(self, output: Any) -> _Outcome:
        tensors = {path: x.detach() for path, x in float_tensors(output)}
        rows = [x.reshape(-1, x.shape[-1] if x.dim() else 1) for x in (tensors[path] for path in self._paths)]
        kept = [
            x[:: 1 + x.numel() // ELEMENTS_COMPARED].float().nan_to_num(0, 0, 0) for x in rows
        ]  # -inf may be a mask
        loss = next((x.item() for x in tensors.values() if x.dim() == 0), None)
        return _Outcome(kept, loss)


class _NotingEffect(torch.autograd.Function):
    """An FP8 layer's output as it is; its backward notes what the layer's error, and rounding alone, does to the loss."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, given: Tensor, anchor: Tensor, *of: Any) -> Tensor:
        ctx.save_for_backward(given)  # which checkpointing lets go of, and makes again
        ctx.of = of
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (given,), (layer, current, found), (gradient,) = ctx.saved_tensors, ctx.of, gradients
        with torch.no_grad(), current():
            error = layer.forward(given).float() - nn.Linear.forward(layer, given).float()
            variance = _ROUNDING * nn.functional.linear(given.square(), layer.weight.square()).float()
        sums = [(gradient.float().square() * each).sum() for each in (error.square(), variance)]
        found[layer] = [a + b for a, b in zip(found.get(layer, (0.0, 0.0)), sums, strict=True)]
        return gradient, *[None] * (2 + len(ctx.of))


def _nothing(*_: Any) -> None:
    """What a rank does for another one: all do the same by themselves."""


_noting_effect = cast("Callable[..., Tensor]", _NotingEffect.apply)


# ---- other tools -------------------------------------------------------------------------------------------------


def _settings(model: nn.Module, found: _Search, inference: bool) -> dict[str, Any]:
    """What the plan is called elsewhere, as keyword arguments.

    Sources: vLLM's `head_dtype` (vllm#48390), SGLang's `--enable-fp32-lm-head` (sglang#10729), TRL's `GRPOConfig`; none of them has
    a setting for other modules, which `without_setting` lists.
    """
    head = _head_of(model)
    wide_head = head is not None and _inside(head, found.wide)
    others = [name for name in found.wide if name != head]
    names = {"FP16": ("fp16", "float16"), "BF16": ("bf16", "bfloat16")}
    if found.audited.name not in names:
        runs = {"accelerate.Accelerator": {"mixed_precision": "fp8"}} if found.audited.name == "scaled FP8" else {}
        return {"hf_amp": {"fp32_modules": found.wide}, **runs, "leave_out_of_conversion": found.wide}
    flag, dtype = names[found.audited.name]
    head_dtype = {"hf_overrides": {"head_dtype": "float32"}} if wide_head else {}
    fp32_head = {"enable_fp32_lm_head": True} if wide_head else {}
    settings: dict[str, Any] = {"vllm": {"dtype": dtype, **head_dtype}, "sglang": {"dtype": dtype, **fp32_head}}
    settings["without_setting"] = {"vllm": others, "sglang": others}
    if inference:
        return settings
    trl = {"trl.GRPOConfig": {flag: True, "cast_lm_head_to_fp32": True}} if wide_head else {}
    training = {"transformers.TrainingArguments": {flag: True}, "accelerate.Accelerator": {"mixed_precision": flag}}
    return {"hf_amp": {"fp32_modules": found.wide}, **training, **trl, **settings}


def _head_of(model: nn.Module) -> str | None:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return next((name for name, module in model.named_modules() if module is head), None)
