"""A model that overflows in FP16 becomes one of the same function that does not: powers of two move between its parameters.

`rescale_for_fp16(model, batch)` records a forward pass (`rescale_rules.py`), gives every parameter an unknown integer exponent,
and asks an integer programme for exponents that bring every activation into FP16's range and change as little as possible. A
product with a power of two rounds nothing, so the outputs stay what they were to the last bit, where epsilons of norms allow.
Nothing is taken on trust: the rescaled model is run in FP32 and in FP16, and recorded once more, before it is handed out.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_amp.emulation import EmulatedPrecision
from hf_amp.errors import AttachError, BatchError, ConfigError, in_one_line
from hf_amp.events import join_names
from hf_amp.precision import FP16_FORMAT
from hf_amp.rescale_rules import FREE, EpsilonSite, Exponent, Node, Recording, Rules, epsilon_attributes, find_slices
from hf_amp.tree import map_tensors, tensors_in

UPPER_BITS = 14
"""Every amax on the batch is brought to 2^14 or less: two bits are left to inputs that give more."""
LOWER_BITS = -8
"""No root mean square is brought below 2^-8 without need, so that few elements become subnormal (below 2^-14)."""
RAISED_BITS = -10
"""What has its root mean square below is raised to it, if anything moves. Subnormal numbers are 2^-24 apart, normal ones 2^-10 of
their size at most, so that they add 4^(-13 - bits) to the squared rounding error of a tensor: 1.6% at 2^-10, 100% at 2^-13."""
LOST_BITS = -12
"""What is below is reason enough to move something where nothing overflows, and to let more move where that raises it."""
LARGEST_EXPONENT = 60
TOLERANCE = 1e-5
"""Relative difference of FP32 outputs that is accepted, where epsilons or 1 + weight do not move exactly."""
LARGEST_DIVERGENCE = 0.1
"""Nats; an FP16 model that is farther from FP32 has too few bits, however well its numbers are placed."""
RANDOM_BATCHES = 2
OBJECTS_DEEP = 1
"""How deep batch objects, such as graphs, are looked into for tensors."""
NAMES_SHOWN = 6
OFFSET_BITS = 0
"""1 + weight is not brought below 1: the weight would be near -1, where FP16's numbers are 2^-11 apart, however small the sum is."""
_OVER, _UNDER, _CHANGE = 1000.0, 1.0, 0.01
"""Costs of a bit: out of range above, below, and of a bit by which a parameter moves."""


@dataclass(frozen=True)
class Stage:
    """What may move besides powers of two in parameters.

    Attributes:
        epsilons: whether epsilons of norms may.
        offsets: whether weights that norms add 1 to may, which is exact for few values only.
        bits: how much smaller than a variance an epsilon has to be to count as nothing; 26 is exact in FP32.
    """

    epsilons: bool = False
    offsets: bool = False
    bits: int = 26


STAGES = (Stage(), Stage(epsilons=True), Stage(True, True), Stage(True, True, bits=18))


@dataclass
class RescaleReport:
    """What `rescale_for_fp16` did, and what was measured.

    Attributes:
        safe: whether `model` runs in pure FP16 with nothing out of range, and computes what the given one does.
        model: the rescaled copy, in the dtypes of the given model; None where it is not safe.
        exponents: parameter → the power of two that it was multiplied by; for one in slices, a power for every row. Where a
            norm adds a number to it (`1 + weight`), the sum was multiplied.
        offsets: parameter → that number.
        epsilons: "module.attribute" → its new value.
        bitwise: whether FP32 outputs are equal to the last bit on the batch and on random inputs.
        relative_difference: largest difference of an FP32 output to the given model's, by the largest absolute value there.
        divergence: mean Kullback-Leibler divergence of FP16's output distribution from FP32's on the batch, in nats; None
            for a model without logits.
        amax: module → (largest absolute value of what its operators give in half precision, before and after).
        refused: why it is not safe, a sentence each.
        unused: parameters that the batch did not use, and which are as they were.
        autocast: whether FP16 was tried as autocast has it, emulated, because the model does not run with half parameters at all:
            its code makes FP32 tensors that meet them.
    """

    safe: bool = False
    model: Any = None
    exponents: dict[str, int | tuple[int, ...]] = field(default_factory=dict)
    offsets: dict[str, float] = field(default_factory=dict)
    epsilons: dict[str, float] = field(default_factory=dict)
    bitwise: bool = False
    relative_difference: float = math.nan
    divergence: float | None = None
    amax: dict[str, tuple[float, float]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    autocast: bool = False

    @property
    def headroom_bits(self) -> dict[str, tuple[float, float]]:
        """Module → bits up to FP16's largest value, before and after; negative where it overflows."""
        return {
            module: (_headroom(before), _headroom(after))
            for module, (before, after) in self.amax.items()
            if before and after
        }

    @property
    def sentence(self) -> str:
        """The outcome in words."""
        if not self.safe:
            return "Not safe in FP16: " + "; ".join(self.refused)
        if not self.exponents:
            return "Nothing to do: everything is in FP16's range already."
        overflowing = sum(before < 0 for before, _ in self.headroom_bits.values())
        cured = f"{overflowing} modules left the range before, none does now"
        if not overflowing:
            cured = "nothing overflowed; what was too small for FP16's bits has them now"
        same = "the same to the last bit" if self.bitwise else f"the same within {self.relative_difference:.1g}"
        unused = (
            f" The batch left {len(self.unused)} parameters unused: what they make was not looked at."
            if self.unused
            else ""
        )
        epsilons = f" and {len(self.epsilons)} epsilons" if self.epsilons else ""
        return (
            f"Safe in FP16{' autocast' * self.autocast}: {len(self.exponents)} parameters{epsilons} were rescaled; {cured}. "
            f"FP32 outputs are {same}.{unused}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON: all but the model."""
        kept = [each.name for each in fields(self) if each.name != "model"]
        return {**{name: getattr(self, name) for name in kept}, "sentence": self.sentence}


def _headroom(amax: float) -> float:
    return math.log2(FP16_FORMAT.largest / amax)


def rescale_for_fp16(model: nn.Module, batch: Any, *, partial: bool = False) -> RescaleReport:
    """Looks for powers of two that bring every activation of `model` into FP16's range, and verifies what they give.

    The given model is not changed. Takes about ten forward passes on the model's device, two of them in FP16, and, beside a
    model in FP32, once its memory. Reads the host throughout.

    Args:
        model: with floating-point parameters of any dtype, whole (not sharded, not quantised). It is run in evaluation mode.
        batch: the arguments of a forward pass: a mapping of names, a tuple, or a single one.
        partial: give `model` in the report also where something stays out of range: rescaled as far as possible, with the same
            outputs in FP32.

    Returns: a report; its `model` is the rescaled copy.

    Raises:
        AttachError: a model that cannot be rescaled at all: quantised, sharded, TorchScript, offloaded; or scipy is missing.
        BatchError: the model cannot be run on the batch, or gives nothing but NaN and inf in FP32.
    """
    _check(model)
    return _Search(model, batch, partial).run()


def parameter_groups(
    model: nn.Module,
    exponents: Mapping[str, int | tuple[int, ...]],
    learning_rate: float,
    *,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Groups under which `torch.optim.AdamW` and its kin take a rescaled model where the original one would go.

    A parameter times c has gradients divided by c, and must move c times as far; Adam moves by the learning rate whatever the size
    of the gradients, but for its epsilon. So `lr` is multiplied by c, `eps` and the decoupled `weight_decay` are divided by it.
    The first group is the one of parameters that stayed as they were, where there are any. Weight decay of a weight that its norm adds 1
    to (`offsets` in the report) pulls to another value than in the original model: give it none.

    Args:
        exponents: of `RescaleReport`, or as read from `fp16_rescale.json`; c is 2 to their power.
        learning_rate, eps, weight_decay: of the original model.

    Raises:
        ConfigError: slices of one parameter were multiplied by different powers, for which no optimizer has groups.
    """
    groups: dict[int, list[nn.Parameter]] = {0: []}
    for name, parameter in model.named_parameters():
        exponent = exponents.get(name, 0)
        powers = set(exponent) if isinstance(exponent, (tuple, list)) else {exponent}
        if len(powers) > 1:
            raise ConfigError(
                f"{name} was multiplied by {len(powers)} powers of two, one a slice: an optimizer has one learning rate for it. "
                "Train the model before it is rescaled."
            )
        groups.setdefault(powers.pop(), []).append(parameter)
    return [
        {"params": p, "lr": learning_rate * 2.0**e, "eps": eps / 2.0**e, "weight_decay": weight_decay / 2.0**e}
        for e, p in groups.items()
        if p
    ]


def _check(model: nn.Module) -> None:
    """Says what cannot be rescaled, and what to do."""
    name, tensors = type(model).__name__, [*model.parameters(), *model.buffers()]
    quantised = getattr(getattr(model, "config", None), "quantization_config", None) is not None
    if quantised or any(p.dtype.itemsize == 1 or type(p.data) is not Tensor for p in model.parameters()):
        if any(hasattr(x, "to_local") for x in tensors):
            raise AttachError(f"{name} is sharded: rescale the whole model, and shard what that gives.")
        raise AttachError(
            f"{name} is quantised: a power of two cannot move into packed weights. Rescale it before it is quantised."
        )
    if any(hasattr(x, "ds_id") for x in tensors) or any(
        m.__class__.__name__.startswith("FSDP") for m in model.modules()
    ):
        raise AttachError(f"{name} is sharded: rescale the whole model, and shard what that gives.")
    if any(x.is_meta for x in tensors) or len({x.device for x in tensors}) > 1:
        raise AttachError(
            f"{name} is offloaded or spread over devices: load the whole of it on one, without device_map."
        )
    if any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        raise AttachError(
            f"{name} is TorchScript, whose code runs past Python: rescale the model that it was made from."
        )
    if not any(p.is_floating_point() for p in model.parameters()):
        raise AttachError(f"{name} has no parameters that a power of two could move between.")
    try:
        import scipy.optimize  # noqa: F401
    except ImportError as error:
        raise AttachError("rescale_for_fp16 needs scipy: pip install 'hf_amp[rescale]'.") from error


# Running


def _converted(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy in evaluation mode with floating-point tensors in `dtype`, which shares those that have it already; None clones all."""

    def convert(x: Tensor) -> Tensor:
        return x.detach().clone() if dtype is None or not x.is_floating_point() else x.detach().to(dtype)

    memo: dict[int, Any] = {id(b): convert(b) for b in model.buffers()}
    memo |= {id(p): nn.Parameter(convert(p), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo).eval()


def _call(model: nn.Module, batch: Any, dtype: torch.dtype, within: AbstractContextManager[Any] | None = None) -> Any:
    """One forward pass without gradients, with the floating-point numbers of the batch in `dtype`."""
    device = next(p.device for p in model.parameters())
    batch = map_tensors(lambda x: x.to(device, dtype if x.is_floating_point() else x.dtype), batch, OBJECTS_DEEP)
    keywords = dict(batch) if isinstance(batch, Mapping) else {}
    arguments = () if isinstance(batch, Mapping) else batch if isinstance(batch, tuple) else (batch,)
    if "use_cache" in inspect.signature(model.forward).parameters:
        keywords.setdefault("use_cache", False)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with within or nullcontext():
            return model(*arguments, **keywords)


def _returned(output: Any) -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) of every floating-point tensor that a model returns; caches are left out."""
    for name, x in tensors_in(output):
        if x.is_floating_point() and not name.startswith(("past_key_values", "cache", "mems", "state")):
            yield name or "output", x


def _random_like(batch: Any, seed: int) -> Any:
    """Another batch of the same kind: other tokens, other pixels, the same masks and positions."""
    generator = torch.Generator().manual_seed(seed)

    def other(x: Tensor) -> Tensor:
        if x.dtype is torch.bool or x.numel() < 2:
            return x
        if x.is_floating_point():
            is_mask = bool(((x == 0) | (x == 1) | x.isinf()).all())
            return x if is_mask else torch.randn(x.shape, generator=generator, device="cpu").to(x) * x.std() + x.mean()
        low, high = int(x.min()), int(x.max())
        if high - low < 2 or low < 0 or bool((x.diff(dim=-1) == 1).all()):
            return x
        return torch.randint(low, high + 1, x.shape, generator=generator, device="cpu").to(x)

    return map_tensors(other, batch)


def named_outputs(
    model: nn.Module, batch: Any, dtype: torch.dtype = torch.float32, within: AbstractContextManager[Any] | None = None
) -> dict[str, Tensor]:
    """Path → what the model returns, in FP32.

    Raises:
        BatchError: the model raises.
    """
    try:
        return {name: x.float() for name, x in _returned(_call(model, batch, dtype, within))}
    except Exception as error:  # whatever the model raises on this batch
        half = "" if dtype is torch.float32 else f" with parameters in {str(dtype).removeprefix('torch.')}"
        raise BatchError(
            f"{type(model).__name__} cannot be run on this batch{half} ({in_one_line(error)}); pass the arguments of its forward by "
            "name."
        ) from error


def difference(exact: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Largest difference of an output, by the largest absolute value there; 0 where all bits are equal, inf where one is not finite."""
    worst = 0.0
    for name, x in exact.items():
        y = other[name]
        finite = x.isfinite()
        if x.shape != y.shape or not torch.equal(finite, y.isfinite()):
            return math.inf
        if not torch.equal(x[finite], y[finite]):
            x, y = x[finite].double(), y[finite].double()
            worst = max(worst, float((x - y).abs().max() / x.abs().max().clamp_min(1e-300)))
    return worst


def divergence(exact: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float | None:
    """KL(exact, other) of the first output named logits, in nats, a mean over its distributions; None where there is none."""
    name = next((name for name, x in exact.items() if name.startswith("logits") and x.ndim > 1), None)
    if name is None:
        return None
    p, q = (x[name].double().log_softmax(-1) for x in (exact, other))
    return float((p.exp() * (p - q)).nan_to_num(0.0).sum(-1).mean())


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name → parameter or persistent buffer of floating-point numbers; tied ones under every name."""
    saved = {id(x) for x in model.state_dict(keep_vars=True).values()}
    named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    return {
        name: x
        for name, x in named.items()
        if x.is_floating_point() and (isinstance(x, nn.Parameter) or id(x) in saved)
    }


def _recorded(made: Callable[[torch.dtype], nn.Module], batches: list[Any]) -> Recording:
    """The operators of forward passes in BF16, whose range is FP32's, and which shows by its dtypes what FP16 would hold.

    The later batches are run only where the first leaves parameters unused, as experts that no token is sent to.

    Args:
        made: gives the model in a dtype, to be used up.
    """
    errors = []
    for dtype in (torch.bfloat16, torch.float32):
        traced = made(dtype)
        recording = Recording(traced, _named_tensors(traced), dtype)
        try:
            for batch in batches:
                output = _call(traced, batch, dtype, recording.watching())
                recording.outputs += [v for _, x in _returned(output) if (v := recording.value_of(x)) is not None]
                if not recording.unused():
                    break
        except Exception as error:  # whatever the model raises in this dtype
            errors.append(in_one_line(error))
            continue
        recording.release()
        return recording
    raise BatchError(f"{type(traced).__name__} cannot be recorded: {errors[-1]}")


class QuickProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Half products on a CPU with FP32 arithmetic inside of them, as a GPU has it: its own half kernels take ten times as long."""

    _PRODUCTS = frozenset(["aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::convolution"])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if (
            func._schema.name not in self._PRODUCTS
            or args[0].dtype is not FP16_FORMAT.dtype
            or args[0].device.type != "cpu"
        ):
            return func(*args, **(kwargs or {}))
        return func(*(x.float() if isinstance(x, Tensor) else x for x in args), **(kwargs or {})).to(FP16_FORMAT.dtype)


class _Search:
    """One model and batch, and stage by stage what may move.

    Raises:
        BatchError: the model cannot be run on the batch, or gives nothing but NaN and inf in FP32.
    """

    def __init__(self, model: nn.Module, batch: Any, partial: bool) -> None:
        self._model, self._partial = model, partial
        self._given = _converted(model, torch.float32)
        self._batches = [batch, *(_random_like(batch, seed) for seed in range(RANDOM_BATCHES))]
        self._wanted = [named_outputs(self._given, each) for each in self._batches]
        if not all(bool(x.isfinite().any()) for x in self._wanted[0].values() if x.numel()):
            raise BatchError(f"{type(model).__name__} gives NaN or inf on this batch in FP32: no rescaling cures that.")
        self._recording = _recorded(functools.partial(_converted, self._given), self._batches)
        self._slices = find_slices(self._recording)

    def run(self) -> RescaleReport:
        first: RescaleReport | None = None
        for solution in self._solutions():
            if solution.over_bits:
                break
            report = self._verified(solution)
            if report.safe:
                return report
            first = first or report
        if solution.fits and (first is None or first.exponents):  # what is too small ends nothing
            return self._verified(solution.unmoved())
        if first is not None:
            return first
        return self._verified(solution) if self._partial else self._report_on(solution)

    def _solutions(self) -> Iterator[Solution]:
        """Stage by stage those that keep every margin, then the others, nearest to them first."""
        strained = []
        for stage in STAGES:
            solution = Programme(self._given, self._recording, self._slices, stage).solve()
            if solution.strained_bits:
                strained.append(solution)
            else:
                yield solution
        yield from sorted(strained, key=lambda each: (each.over_bits, each.strained_bits))

    def _report_on(self, solution: Solution) -> RescaleReport:
        report = RescaleReport(refused=list(solution.refused), unused=self._recording.unused())
        for variable, exponent in zip(solution.rules.variables, solution.exponents, strict=True):
            if variable.dim is None:
                if exponent:
                    report.exponents[variable.parameter] = exponent
            else:
                size = self._recording.parameters[variable.parameter].shape[variable.dim]
                rows = list(report.exponents.get(variable.parameter, (0,) * size))  # type: ignore[arg-type]
                for row in variable.rows:
                    rows[row] = exponent
                report.exponents[variable.parameter] = tuple(rows)
            if variable.offset and exponent:
                report.offsets[variable.parameter] = variable.offset
        uniform = {n: set(e) for n, e in report.exponents.items() if not isinstance(e, int)}
        report.exponents |= {n: e.pop() for n, e in uniform.items() if len(e) == 1}
        report.exponents = {n: e for n, e in report.exponents.items() if e}
        patterns = {re.sub(r"\d+", "#", name) for name in report.exponents}
        if left := [name for name in report.unused if re.sub(r"\d+", "#", name) in patterns]:
            report.refused.append(
                f"the batch did not use {join_names(left, NAMES_SHOWN)}, whose like would be rescaled: pass a larger batch"
            )
        return report

    def _verified(self, solution: Solution) -> RescaleReport:
        """The rescaled copy, and whether it is what it should be."""
        report = self._report_on(solution)
        made = functools.partial(self._made, solution, report)
        exact = made(torch.float32)
        differences = [difference(x, named_outputs(exact, b)) for x, b in zip(self._wanted, self._batches, strict=True)]
        del exact  # memory: one copy of the model at a time
        report.relative_difference = max(differences)
        report.bitwise = report.relative_difference == 0
        if not report.relative_difference <= TOLERANCE:
            report.refused.append(f"FP32 outputs would change by {report.relative_difference:.1g}")
        again = _recorded(made, self._batches) if report.exponents else self._recording
        report.refused += solution.disagreements(again, report.bitwise and not report.offsets)
        before, after = self._recording.amax_by_module(), again.amax_by_module()
        report.amax = {module: (amax, after.get(module, 0.0)) for module, amax in before.items()}
        if not report.refused:
            report.refused += [f"{m} comes to {x:.3g}" for m, (_, x) in report.amax.items() if x > FP16_FORMAT.largest]
        self._run_in_half(made, report)
        report.safe = not report.refused
        if report.safe or (self._partial and report.relative_difference <= TOLERANCE):
            report.model = made(None)
        return report

    def _made(self, solution: Solution, report: RescaleReport, dtype: torch.dtype | None) -> nn.Module:
        """A rescaled copy, with its floating-point tensors in `dtype`; None for the dtypes of the given model."""
        made = _converted(self._model, None)
        solution.apply(made, self._recording, report)
        for x in (*made.parameters(), *made.buffers()):
            if dtype is not None and x.is_floating_point():
                x.data = x.data.to(dtype)
        return made

    def _run_in_half(self, made: Callable[[torch.dtype], nn.Module], report: RescaleReport) -> None:
        """Pure FP16, or, where the model cannot be run in it at all, what autocast computes."""
        half, dtype = made(FP16_FORMAT.dtype), FP16_FORMAT.dtype
        within: AbstractContextManager[Any] = QuickProducts()  # type: ignore[no-untyped-call]
        for i, batch in enumerate(self._batches[:2]):
            try:
                outputs = named_outputs(half, batch, dtype, within)
            except BatchError as error:
                report.autocast, half, dtype = True, made(torch.float32), torch.float32
                if i or not isinstance(error.__cause__, RuntimeError):
                    report.refused.append(str(error))
                    return
                within = EmulatedPrecision(FP16_FORMAT)
                outputs = named_outputs(half, batch, dtype, within)
            wanted = self._wanted[i]
            if any(bool((wanted[name].isfinite() & ~x.isfinite()).any()) for name, x in outputs.items()):
                report.refused.append(f"FP16 outputs on {'random inputs' if i else 'the batch'} are not finite")
                return
            if i == 0 and (nats := divergence(wanted, outputs)) is not None:
                report.divergence = nats
                if not nats <= LARGEST_DIVERGENCE:
                    report.refused.append(f"FP16 is {nats:.2g} nats from FP32: it has too few bits for this model")


# Solving


@dataclass(frozen=True)
class EpsilonGroup:
    """Epsilons that move together, because one number of the configuration makes them all.

    Attributes:
        sites: (module, attribute).
        config: the path of that number in `model.config`; empty for an attribute by itself.
    """

    sites: frozenset[tuple[str, str]]
    config: tuple[str, ...] = ()


@dataclass
class Solution:
    """Exponents for all variables, and what they leave out of range.

    Attributes:
        exponents: of `rules.variables`.
        epsilons: by how much each group of epsilons grows, as a power of two.
        over_bits: by how many bits in all the range is left.
        strained_bits: by how many bits in all margins are missed: amax above `UPPER_BITS`, root mean squares below `LOST_BITS`.
        fits: whether every amax was in range, with the margin, before.
        refused: what stays out of range and why, a sentence each.
    """

    rules: Rules
    exponents: list[int]
    epsilons: dict[EpsilonGroup, int]
    over_bits: float = 0.0
    strained_bits: float = 0.0
    fits: bool = False
    refused: list[str] = field(default_factory=list)

    def unmoved(self) -> Solution:
        """The one that moves nothing."""
        return Solution(self.rules, [0] * len(self.exponents), {}, fits=self.fits)

    def of(self, terms: Exponent) -> int:
        """The value of an exponent."""
        return sum(count * self.exponents[variable] for variable, count in terms)

    def apply(self, model: nn.Module, recording: Recording, report: RescaleReport) -> None:
        """Multiplies what has to be in place: parameters, persistent buffers, epsilons, the configuration's too."""
        named: dict[str, dict[int, Tensor]] = defaultdict(dict)
        for name, tensor in _named_tensors(model).items():
            named[recording.names[name]][id(tensor)] = tensor
        moved_with_offset = {v.parameter for v in self.rules.variables if v.offset}
        with torch.no_grad():
            for variable, exponent in zip(self.rules.variables, self.exponents, strict=True):
                if not exponent or (not variable.offset and variable.parameter in moved_with_offset):
                    continue
                for tensor in named[variable.parameter].values():
                    if variable.offset:
                        tensor.copy_((tensor.double() + variable.offset) * 2.0**exponent - variable.offset)
                    elif variable.dim is None:
                        tensor.mul_(2.0**exponent)
                    else:
                        rows = torch.tensor(variable.rows, device=tensor.device)
                        tensor.index_copy_(variable.dim, rows, tensor.index_select(variable.dim, rows) * 2.0**exponent)
        for group, exponent in self.epsilons.items():
            for name, attribute in sorted(group.sites) if exponent else ():
                module = model.get_submodule(name)
                new = getattr(module, attribute) * 2.0**exponent
                setattr(module, attribute, new)
                report.epsilons[f"{name}.{attribute}".lstrip(".")] = new
                if group.config:
                    *path, last = group.config
                    setattr(functools.reduce(getattr, path, model.config), last, new)

    def disagreements(self, again: Recording, exact: bool) -> list[str]:
        """Where the rescaled model's operators do not give what the exponents say; a sentence about the first one."""
        recording = self.rules.recording
        sums = {v.parameter for v in self.rules.variables if v.offset}
        if [n.name for n in again.nodes] != [n.name for n in recording.nodes]:
            return ["the rescaled model runs other operators than the given one"]
        for old, new in zip(recording.nodes, again.nodes, strict=True):
            for before, after in zip(old.outputs, new.outputs, strict=True):
                numbers = self.rules.fields[before].flatten().tolist() if before in self.rules.fields else []
                if len(numbers) != 1 or numbers[0] == FREE or not before.is_float or before.pure in sums:
                    continue
                wanted = before.amax * 2.0 ** self.of(self.rules.exponents.terms[numbers[0]])
                if not math.isclose(after.amax, wanted, rel_tol=1e-6 if exact else 0.05, abs_tol=1e-30):
                    return [f"{old} gives {after.amax:.4g} after rescaling, where {wanted:.4g} was expected"]
        return []


class Programme:
    """The integer programme: exponents under which the function stays, every amax fits, and least is changed.

    Args:
        model: in FP32.
        recording: of it.
        slices: of `find_slices`.
        stage: what may move.

    Source: mixed-integer linear programming by HiGHS, https://highs.dev, through `scipy.optimize.milp`.
    """

    def __init__(
        self, model: nn.Module, recording: Recording, slices: dict[str, tuple[int, list[int]]], stage: Stage
    ) -> None:
        self._model = model
        self._rules = rules = Rules(recording, slices, stage.offsets)
        self._stage = stage
        for value in recording.outputs:
            rules.require_zero(rules.of(value), None)
        self._groups = epsilon_groups(model, rules.sites) if stage.epsilons else {}
        self._group_list = list(dict.fromkeys(self._groups.values()))
        self._count = len(rules.variables)
        self._rows: list[tuple[dict[int, float], float, float]] = []
        self._costs: list[float] = [0.0] * (self._count + len(self._group_list))
        self._equations: list[tuple[Exponent, str]] = []
        self._uppers: dict[Exponent, tuple[float, int, Node | str]] = {}
        self._lowers: list[tuple[Exponent, float]] = []

    def _new(self, cost: float) -> int:
        """A further unknown, which is not negative."""
        self._costs.append(cost)
        return len(self._costs) - 1

    def solve(self) -> Solution:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import coo_array

        self._equate()
        self._bound()
        whole = self._count + len(self._group_list)
        fits = all(amax <= 2.0**UPPER_BITS for amax, _, _ in self._uppers.values())
        unmoved = Solution(self._rules, [0] * self._count, {}, fits=fits)
        if not self._strained_bits(unmoved):
            return unmoved
        for index in range(whole):
            size = self._new(_CHANGE)
            self._rows += [({index: 1.0, size: -1.0}, -np.inf, 0.0), ({index: 1.0, size: 1.0}, 0.0, np.inf)]
        entries = [(i, j, x) for i, (row, _, _) in enumerate(self._rows) for j, x in row.items()]
        i, j, x = zip(*entries, strict=True)
        matrix = coo_array((x, (i, j)), shape=(len(self._rows), len(self._costs))).tocsr()
        low, high = zip(*((low, high) for _, low, high in self._rows), strict=True)
        integral = np.array([1] * whole + [0] * (len(self._costs) - whole))
        bounds = Bounds(
            np.where(integral, -LARGEST_EXPONENT, 0), np.where(integral, LARGEST_EXPONENT, np.inf)
        )  # fmt: skip
        result = milp(self._costs, integrality=integral, bounds=bounds, constraints=LinearConstraint(matrix, low, high),
                      options={"time_limit": 60.0, "mip_rel_gap": 1e-3})  # fmt: skip
        found = [0] * whole if result.x is None else [round(value) for value in result.x[:whole]]
        epsilons = dict(zip(self._group_list, found[self._count :], strict=True))
        solution = Solution(self._rules, found[: self._count], epsilons, fits=fits)
        solution.strained_bits = self._strained_bits(solution)
        self._name_what_is_left(solution)
        return solution

    def _strained_bits(self, solution: Solution) -> float:
        above = [math.log2(amax) + solution.of(terms) - UPPER_BITS for terms, (amax, _, _) in self._uppers.items()]
        below = [LOST_BITS - bits - solution.of(terms) for terms, bits in self._lowers]
        return sum(max(0.0, bits) for bits in (*above, *below))

    def _equate(self) -> None:
        """What must be 0 for the function to stay, epsilons included."""
        terms = self._rules.exponents.terms
        for number, node in self._rules.zero.items():
            self._equations.append((terms[number], "the model's output" if node is None else str(node)))
            self._rows.append(({v: float(n) for v, n in terms[number]}, 0.0, 0.0))
        for site in self._rules.sites:
            if site.exponent == FREE or site.epsilon <= 0:
                continue
            row = {v: float(n) for v, n in terms[site.exponent]}
            group = self._group_of(site)
            if group is not None:
                row[self._count + self._group_list.index(group)] = -1.0
            bits = min(site.bits, self._stage.bits)
            room = math.log2(site.epsilon) + bits - math.log2(site.least) if site.least > 0 else math.inf
            if room <= 0:
                self._rows.append((row, math.floor(room) if math.isfinite(room) else 0.0, math.inf))
            else:
                self._rows.append((row, 0.0, 0.0))
                if group is None:
                    self._equations.append((terms[site.exponent], f"the epsilon of {site.node}"))

    def _group_of(self, site: EpsilonSite) -> EpsilonGroup | None:
        for attribute in epsilon_attributes(self._model.get_submodule(site.node.module), site.epsilon):
            if (group := self._groups.get((site.node.module, attribute))) is not None:
                return group
        return None

    def _bound(self) -> None:
        """Every half-precision tensor is kept in range, parameters too, slice by slice."""
        rules = self._rules
        lowers: dict[Exponent, float] = {}
        for node in rules.recording.nodes:
            for value in node.results:
                f = rules.fields.get(value)
                if f is None or f.numel() != 1 or value.dtype is not rules.recording.dtype or not value.amax:
                    continue
                terms = rules.exponents.terms[int(f)] if int(f) != FREE else ()
                self._upper(terms, value.amax, node)
                if terms:
                    lowers[terms] = min(lowers.get(terms, math.inf), value.rms)
        named = _named_tensors(self._model)
        for index, variable in enumerate(rules.variables):
            x = named[variable.parameter].detach()
            if variable.dim is not None:
                x = x.index_select(variable.dim, torch.tensor(variable.rows, device=x.device))
            x = x + variable.offset if variable.offset else x
            amax, rms = float(x.abs().amax()), float(torch.linalg.vector_norm(x)) / math.sqrt(x.numel())
            if amax and math.isfinite(amax):
                self._upper(((index, 1),), amax, variable.parameter)
                self._lower(((index, 1),), rms, x.ndim > 1, OFFSET_BITS if variable.offset else LOWER_BITS)
        for terms, rms in lowers.items():
            self._lower(terms, rms, True)
        for terms, (amax, slack, _) in self._uppers.items():
            self._rows.append(
                ({**{v: float(n) for v, n in terms}, slack: -1.0}, -math.inf, UPPER_BITS - math.log2(amax))
            )

    def _upper(self, terms: Exponent, amax: float, where: Node | str) -> None:
        known = self._uppers.get(terms)
        if known is None or known[0] < amax:
            self._uppers[terms] = (amax, known[1] if known else self._new(_OVER), where)

    def _lower(self, terms: Exponent, rms: float, raised: bool, wanted: int = LOWER_BITS) -> None:
        """A root mean square stays at 2^wanted or above; one below that is not lowered, and raised to `RAISED_BITS` if `raised`."""
        if not rms:
            return
        bits = math.log2(rms)
        least = wanted - bits if bits >= wanted else max(0.0, RAISED_BITS - bits) if raised else 0.0
        self._rows.append(({**{v: float(n) for v, n in terms}, self._new(_UNDER): 1.0}, least, math.inf))
        if raised:
            self._lowers.append((terms, bits))

    def _name_what_is_left(self, solution: Solution) -> None:
        left = []
        for terms, (amax, _, where) in self._uppers.items():
            after = amax * 2.0 ** solution.of(terms)
            if after > FP16_FORMAT.largest:
                left.append((after, terms, where))
        solution.over_bits = sum(-_headroom(after) for after, _, _ in left)
        for after, terms, where in sorted(left, key=lambda each: -each[0])[:NAMES_SHOWN]:
            solution.refused.append(f"{where} comes to {after:.3g}: {self._reason(terms)}")

    def _reason(self, terms: Exponent) -> str:
        """Which operators hold an exponent where it is: the equations that it is a sum of, as few as possible."""
        import numpy as np
        from scipy.optimize import linprog

        if not terms:
            return "no parameter has a factor on it that could be taken away"
        matrix = np.zeros((self._count, len(self._equations)))
        for i, (row, _) in enumerate(self._equations):
            for variable, n in row:
                matrix[variable, i] = n
        wanted = np.zeros(self._count)
        for variable, n in terms:
            wanted[variable] = n
        if self._equations:
            size = 2 * len(self._equations)
            result = linprog(np.ones(size), A_eq=np.hstack([matrix, -matrix]), b_eq=wanted, bounds=(0, None))
            if result.x is not None:
                parts = result.x[: size // 2] - result.x[size // 2 :]
                held = [self._equations[k][1] for k in np.flatnonzero(np.abs(parts) > 1e-6)]
                return f"held by {join_names(list(dict.fromkeys(held)), NAMES_SHOWN)}"
        return "what is before or behind it leaves no room"


def epsilon_groups(model: nn.Module, sites: list[EpsilonSite]) -> dict[tuple[str, str], EpsilonGroup]:
    """(module, attribute) of every epsilon that may move → what moves with it.

    A model with a configuration is built from it on the meta device, with one number changed at a time, to see which modules it
    reaches: an epsilon that no number of the configuration makes would be lost in a checkpoint, and stays.
    """
    used = {
        (site.node.module, attribute)
        for site in sites
        for attribute in epsilon_attributes(model.get_submodule(site.node.module), site.epsilon)
    }
    config = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return {place: EpsilonGroup(frozenset([place])) for place in used}
    found: dict[tuple[str, str], EpsilonGroup] = {}
    try:
        plain = _float_attributes(_built(model, config))
        for path in _epsilon_fields(config):
            changed = copy.deepcopy(config)
            owner = functools.reduce(getattr, path[:-1], changed)
            setattr(owner, path[-1], getattr(owner, path[-1]) * 4)
            other = _float_attributes(_built(model, changed))
            reached = frozenset(place for place, x in plain.items() if x and other.get(place) == 4 * x)
            values = {getattr(model.get_submodule(name), attribute) for name, attribute in reached}
            for place in reached:
                together = len(values) == 1
                found[place] = EpsilonGroup(reached, path) if together else EpsilonGroup(frozenset([place]))
    except Exception:  # a model that cannot be built on the meta device
        return {}
    return found


def _built(model: nn.Module, config: Any) -> nn.Module:
    with torch.device("meta"):
        return type(model)(copy.deepcopy(config))


def _float_attributes(model: nn.Module) -> dict[tuple[str, str], float]:
    return {
        (name, attribute): x
        for name, m in model.named_modules()
        for attribute, x in vars(m).items()
        if isinstance(x, float)
    }


def _epsilon_fields(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of the numbers of a configuration, and of those inside of it, that are called an epsilon."""
    for name, item in vars(config).items():
        if isinstance(item, float) and "eps" in name.lower():
            yield (*path, name)
        elif hasattr(item, "to_dict") and not name.startswith("_"):
            yield from _epsilon_fields(item, (*path, name))
