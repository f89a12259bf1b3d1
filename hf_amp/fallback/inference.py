"""What half-precision parameters do to a model in inference, where no autocast keeps anything in FP32."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_amp.emulation import EmulatedPrecision, in_backward
from hf_amp.events import Cause, join_names
from hf_amp.fallback.diagnosis import Diagnoser, SkippedStep
from hf_amp.fallback.module_precision import CurrentPrecision, PlanRunner, PrecisionEntry, without_its_precision
from hf_amp.fallback.operators import BadOperator
from hf_amp.fallback.recorder import ForwardRecorder, RecordedForward
from hf_amp.fallback.replay import ReplayFindings, float_tensors, replay
from hf_amp.patch_log import removal, takes_hooks
from hf_amp.precision import BF16_FORMAT, FP16_FORMAT, FP32_FORMAT, HALF_DTYPES, NumberFormat, PrecisionMode
from hf_amp.tree import tensors_of


@dataclass
class Headroom:
    """The largest finite value that a model computes in a format, or casts to it; in FP8 of products' operands and results.

    Attributes:
        module: the innermost module that computes it; "" for the model itself.
        amax: that value's magnitude.
        bits: log2 of how many times larger it may get before it overflows.
    """

    module: str
    amax: float
    bits: float


_Check = TypeVar("_Check", bound="FormatCheck")


@dataclass
class FormatCheck:
    """What a model does in one format on a batch.

    Attributes:
        number_format: whose range is in question.
        overflowing: modules whose output leaves its range although their inputs are in it, or that cannot take what a module in FP32
            gives them; in the order in which they run. "" is the model's own forward.
        first_non_finite: the first module whose output is not finite in FP32 either; None where there is none.
        operators: module → the operator in it that overflows, its line and its values; for FP16 and BF16.
        in_backward: modules of which a gradient leaves the range at every loss scale, and in FP32 does not; as a run finds them.
        headroom: the largest value beside the modules that overflow, with them in FP32; None where nothing is known.
        not_run: modules that the batch did not reach, of which nothing is known.
        error: why it could not be run; None where it could.
    """

    number_format: NumberFormat
    overflowing: list[str] = field(default_factory=list)
    first_non_finite: str | None = None
    operators: dict[str, str] = field(default_factory=dict)
    headroom: Headroom | None = None
    not_run: list[str] = field(default_factory=list)
    error: str | None = None
    in_backward: list[str] = field(default_factory=list)

    during: ClassVar[str] = "training"

    @classmethod
    def of(cls: type[_Check], number_format: NumberFormat, found: ReplayFindings, values: LargestValues) -> _Check:
        """What one forward pass has shown."""
        result = cls(number_format, found.overflowing, found.first_non_finite, operators_in(found.operators))
        result.error, result.not_run = found.error, values.not_run()
        if result.error is None and result.first_non_finite is None:
            result.headroom = values.beside(found.overflowing)
        return result

    @property
    def to_widen(self) -> list[str]:
        """The modules that overflow, forward or backward."""
        return list(dict.fromkeys([*self.overflowing, *self.in_backward]))

    @property
    def remedy(self) -> str:
        """What cures what overflows, in words."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        return {**asdict(self), "number_format": self.number_format.name}

    def verdict(self) -> str:
        """One sentence."""
        name, near = self.number_format.name, self.headroom
        if self.error is not None:
            return f"{name}: the model could not be run on this batch ({self.error})."
        if self.first_non_finite is not None:
            where = named(self.first_non_finite)
            return f"What {where} returns is not finite in FP32 either: fix the model or the batch first."
        if self.to_widen:
            count = f"{len(self.to_widen)} module{'s' if len(self.to_widen) > 1 else ''}"
            return f"{name} overflows in {count} in {self.during}: {self.remedy}."
        spare = "" if near is None else f", with {near.bits:.1f} bits to spare in {named(near.module)}"
        return f"{name} overflows nowhere in {self.during}{spare}."

    @staticmethod
    def names(modules: Iterable[str]) -> str:
        """The first of them, for a sentence."""
        return join_names([named(each) for each in modules], NAMES_SHOWN)

    def sentences(self) -> Iterator[str]:
        """What was found, a line each."""
        name = self.number_format.name
        if self.error is not None:
            yield f"{name} could not be run: {self.error}"
        if self.first_non_finite is not None:
            yield f"{name} not finite in FP32 either: {named(self.first_non_finite)}"
        if self.overflowing:
            yield f"{name} overflow: {self.names(self.overflowing)}"
        if self.in_backward:
            yield f"{name} overflow in backward, at every loss scale: {self.names(self.in_backward)}"
        for module, operator in list(self.operators.items())[:NAMES_SHOWN]:
            yield f"{name} in {named(module)}: {operator}"
        if (near := self.headroom) is not None:
            where = f"{near.amax:.4g} in {named(near.module)}, {near.bits:.1f} bits below overflow"
            yield f"{name} largest value{' of the rest' if self.overflowing else ''}: {where}"


NAMES_SHOWN = 12


def named(module: str) -> str:
    """The name of a module for a sentence."""
    return module or "the model itself"


@dataclass
class InferenceCheck(FormatCheck):
    """What a copy of a model in one half-precision format does on a batch.

    Attributes:
        weights: parameters and buffers that hold values beyond its range. They are FP32 in all that follows.
        inputs: arguments of the batch that do. They too.
        log_probability_error: root mean square difference of log-probabilities from FP32's, over the last dimension of
            `logits`, with the modules that overflow in FP32; None without logits, or where the model itself overflows.
    """

    during = "inference"
    weights: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    log_probability_error: float | None = None

    @property
    def remedy(self) -> str:
        """What cures what overflows, in words."""
        several = len(self.overflowing or self.weights or self.inputs) > 1
        return f"use BF16, or keep {'them' if several else 'it'} in FP32"

    def verdict(self) -> str:
        """One sentence."""
        beyond = self.weights or self.inputs
        if self.overflowing or not beyond or self.first_non_finite is not None:
            return super().verdict()
        count = f"{len(beyond)} {'weight' if self.weights else 'input'}{'s' if len(beyond) > 1 else ''}"
        return f"{self.number_format.name} overflows in {count} in inference: {self.remedy}."

    def sentences(self) -> Iterator[str]:
        """What was found, a line each."""
        name = self.number_format.name
        if self.weights:
            yield f"{name} weights beyond its range: {self.names(self.weights)}"
        if self.inputs:
            yield f"{name} inputs beyond its range: {self.names(self.inputs)}"
        yield from super().sentences()
        if self.log_probability_error is not None:
            wide = " with those in FP32" if self.overflowing or self.weights or self.inputs else ""
            yield f"{name} log-probabilities{wide}: {self.log_probability_error:.2g} from FP32's (root mean square)"


@dataclass(frozen=True)
class HalfModelEntry(PrecisionEntry):
    """Runs a model whose parameters are of one format, without autocast; values that come in FP32 are cast to it.

    Attributes:
        originals: (tensor of the model, what it is in FP32) of its parameters and buffers, which FP32 is run with.
    """

    device_type: str = "cpu"
    emulate: bool = True
    number_format: NumberFormat = FP16_FORMAT
    originals: tuple[tuple[Tensor, Tensor], ...] = ()

    def context(self, precision: PrecisionMode) -> AbstractContextManager[Any]:
        if precision is PrecisionMode.FP32:
            return self._in_fp32()
        return EmulatedPrecision(self.number_format, autocast=False, casts_mixed=True)

    @contextmanager
    def _in_fp32(self) -> Iterator[None]:
        former = [tensor.data for tensor, _ in self.originals]
        try:
            for tensor, original in self.originals:
                tensor.data = original
            with EmulatedPrecision(FP32_FORMAT):
                yield
        finally:
            for (tensor, _), data in zip(self.originals, former, strict=True):
                tensor.data = data


def check_inference(model: nn.Module, batch: Mapping[str, Any]) -> list[InferenceCheck]:
    """What FP16 and BF16 copies of `model` do in inference on `batch`: whether they overflow, where, and how near they are to it.

    The whole of a copy is of the format (`model.half()`), but for modules that transformers keeps in FP32
    (`_keep_in_fp32_modules`). Runs on the CPU, in three forward passes, and at most one more a format that overflows; `model` stays as it is.

    Args:
        model: on the CPU, of any floating-point dtype.
        batch: arguments of the model by name. Floating-point tensors are cast to the format.

    Returns:
        One for FP16 and one for BF16.
    """
    with torch.no_grad(), without_its_precision(model):
        exact = copy.deepcopy(model).float().eval()
        expected = _log_probabilities(exact(**{name: _cast(x, torch.float32) for name, x in batch.items()}))
        return [_checked(exact, batch, expected, number_format) for number_format in (FP16_FORMAT, BF16_FORMAT)]


def _checked(
    exact: nn.Module, batch: Mapping[str, Any], expected: Tensor | None, number_format: NumberFormat
) -> InferenceCheck:
    dtype = number_format.dtype
    twin, beyond = half_copy(exact, dtype)
    inputs = {name: _cast(x, dtype) for name, x in batch.items()}
    too_large = [name for name, x in inputs.items() if isinstance(x, Tensor) and _leaves(x, batch[name])]
    inputs |= {name: batch[name].float() for name in too_large}
    pairs = zip([*twin.parameters(), *twin.buffers()], [*exact.parameters(), *exact.buffers()], strict=True)
    entry = HalfModelEntry(
        number_format=number_format, originals=tuple((x, y.detach()) for x, y in pairs if x.is_floating_point())
    )
    with LargestValues(twin, number_format) as largest:
        found = replay(RecordedForward(twin, (), inputs), CurrentPrecision(entry, PrecisionMode.MIXED))
    result = InferenceCheck.of(number_format, found, largest)
    result.weights, result.inputs = beyond, too_large
    if found.error is None and found.first_non_finite is None:
        actual = None if "" in found.overflowing else _log_probabilities(found.output)
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
        if _leaves(tensor, original):
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
        described[module] = f"{kind}: {operator.what}" + (f"; {operator.hint}" if operator.hint else "")
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


def loss_of(output: Any) -> tuple[Tensor, bool]:
    """The model's own loss, where a Trainer takes it, and True; without one, the mean square of all that it returns, and False."""
    first = output[0] if isinstance(output, tuple) and isinstance(output[0], Tensor) and not output[0].dim() else None
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", first)
    if loss is not None:
        return torch.as_tensor(loss), True
    return torch.stack([x.float().square().mean() for _, x in float_tensors(output) if x.requires_grad]).sum(), False


@contextmanager
def widened(model: nn.Module, names: Iterable[str], entry: PrecisionEntry) -> Iterator[PlanRunner]:
    """Inside of it the modules of those names run in FP32, as a plan has them."""
    runner = PlanRunner(entry, PrecisionMode.MIXED)
    runner.register_model(model)
    runner.apply(runner.plan.with_modules(names, PrecisionMode.FP32))
    try:
        yield runner
    finally:
        runner.remove()


@dataclass
class _OneStep:
    """What a recorder asks of whoever counts steps."""

    decided_steps: int = 0
    known_steps: int = 0
    backwards: int = 0
    graph: Any = None
    note_loss: Any = None


def leaving_in_backward(
    model: nn.Module, batch: Mapping[str, Any], wide: Iterable[str], entry: PrecisionEntry
) -> list[str]:
    """Modules of which a gradient leaves the format at every loss scale, and in FP32 does not, with those of `wide` in FP32.

    By the diagnosis that a run makes when it skips such a step, which costs a few passes. `model` returns its loss.
    """
    with widened(model, wide, entry) as runner, torch.random.fork_rng(devices=[]):
        steps = _OneStep()
        recorder = ForwardRecorder(steps, runner)
        remove = recorder.watch(model, model)
        try:
            with runner.current() as precision:
                loss = loss_of(model(**batch))[0]
        finally:
            remove()
        steps.graph, parameters = loss.grad_fn, list(model.named_parameters())
        with in_backward(precision):
            torch.autograd.grad(loss, [p for _, p in parameters if p.requires_grad], allow_unused=True)
        steps.decided_steps, steps.backwards = 1, 1
        skip = SkippedStep(1, True, 1.0, 1.0, parameters)
        found = Diagnoser(runner, recorder).explain(skip, agree=False)
    return list(found.modules) if found.cause is Cause.ACTIVATION and found.confirmed else []


class LargestValues(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, the largest finite value of a format that each module computes or casts to it; weights and masks left out.

    What autocast keeps in FP32 is no such value. One GPU-CPU sync an operator.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, number_format: NumberFormat) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model, self._format = model, number_format
        self._modules, self._handles = list[str](), list[Any]()
        self._found: dict[str, float] = {}
        self._ran = set[str]()

    def __enter__(self) -> Any:
        for name, module in self._model.named_modules():
            if takes_hooks(module):
                enter = module.register_forward_pre_hook(functools.partial(self._enter, name), prepend=True)
                self._handles.append(enter)
                self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *exception: Any) -> None:
        removal(self._handles)()
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def _enter(self, name: str, *_: Any) -> None:
        self._modules.append(name)
        while name and name not in self._ran:
            self._ran.add(name)
            name = name.rpartition(".")[0]

    def _leave(self, *_: Any) -> None:
        if self._modules:
            self._modules.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "name", str)()
        if not self._modules or name.startswith(("aten::empty", "aten::new_empty")) or getattr(func, "is_view", False):
            return result
        given = [x for x in tensors_of(args) if x.is_floating_point()]
        if name in ("aten::aminmax", "aten::abs") or (given and not any(x.dim() for x in given)):
            return result  # the replay itself looks at what was computed
        of = given[0]._base if given and given[0]._base is not None else (*given, None)[0]
        is_weight = isinstance(of, nn.Parameter) and name in ("aten::_to_copy", "hf_amp::round_to")
        made = [] if is_weight else tensors_of(result)[:1]  # beside it may stand a norm's statistics, FP32 on a device
        for x in made:
            is_rounded = name.startswith("hf_amp::") or x.dtype == self._format.dtype
            if is_rounded and type(x) is Tensor and x.numel():
                self._note(x.detach().float(), given)
        return result

    def _note(self, x: Tensor, given: list[Tensor]) -> None:
        module, lowest = self._modules[-1], -self._format.largest
        amax, may_be_mask = x.abs().amax().item(), self._format.dtype in HALF_DTYPES
        if not amax < -lowest / 4:  # large, or not finite
            kept = x.isfinite()
            for mask in (x, *given) if may_be_mask else ():  # is the least value itself, or was added to something
                sizes = zip(reversed(mask.shape), reversed(x.shape), strict=False)
                if mask.dim() <= x.dim() and all(size in (1, of_x) for size, of_x in sizes):
                    kept = kept & (mask != lowest)
            amax = x.where(kept, 0.0).abs().amax().item()
        if amax > self._found.get(module, 0.0):  # it moves to the end, where what reached its largest last stands
            self._found.pop(module, None)
            self._found[module] = amax

    def not_run(self) -> list[str]:
        """The outermost modules of several that have parameters, and of which none was called."""
        found: list[str] = []
        for name, module in self._model.named_modules():
            holds = any(True for child in module.children() for _ in child.parameters())
            if name and holds and takes_hooks(module) and name not in self._ran:
                found += [] if f"{name}.".startswith(tuple(f"{outer}." for outer in found)) else [name]
        return found

    def beside(self, overflowing: Collection[str]) -> Headroom | None:
        """The largest value outside of those modules; None where there is none."""
        inside = tuple(f"{name}." if name else "" for name in overflowing)
        found = {name: amax for name, amax in self._found.items() if amax and not f"{name}.".startswith(inside)}
        if not found:
            return None
        module = max(found, key=lambda name: found[name])  # the first of equals, not one around it, which returns it
        return Headroom(module, found[module], math.log2(self._format.largest / found[module]))


def _leaves(rounded: Tensor, original: Tensor) -> bool:
    """Whether finite values became infinite ones; of quantized ones nothing is known."""
    is_plain = rounded.is_floating_point() and type(original.data) is Tensor
    return is_plain and not torch.equal(rounded.isfinite(), original.isfinite())


def _cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def _log_probabilities(output: Any) -> Tensor | None:
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return logits.float().log_softmax(-1) if isinstance(logits, Tensor) else None
