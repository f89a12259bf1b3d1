"""Where two settings of one step part: `hf_amp.compare(model_a, model_b, batch)`.

Both steps run, and then the second once more with every module taking, returning, and getting as gradients what the first one
did, so that each module is seen by itself: what differs then is its own doing, and not what came before it. The bound is
measured: the first step once more against itself, with noise of the format's spacing at all of that (TTrace, arXiv 2506.09280).
Of capture files there is only what the runs did; there the first module whose inputs agree and whose outputs do not is named.
"""

from __future__ import annotations

import difflib
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from hf_amp.capture import (
    Digest,
    Key,
    Spacing,
    Trace,
    Tracer,
    captured,
    load_capture,
    scale_for,
    spacing_of,
    trace_step,
)
from hf_amp.device import RandomState, devices_of
from hf_amp.errors import AttachError, ConfigError, StateError
from hf_amp.events import counted_names, join_names
from hf_amp.fallback.module_precision import CurrentPrecision, PlanRunner, PrecisionEntry, without_its_precision
from hf_amp.fallback.plan import PrecisionPlan
from hf_amp.fallback.recorder import RecordedForward
from hf_amp.precision import HALF_DTYPES, PrecisionMode
from hf_amp.tree import map_tensors

FACTOR = 3.0
"""Times the deviation that noise of the format's spacing makes: what rounding explains. Source: tests/benchmarks/test_compare.py."""
WORST = 10
_MODES = {mode.value: mode for mode in PrecisionMode} | {"FP16": PrecisionMode.MIXED}
_MODES.pop("DYNAMIC")


@dataclass(frozen=True)
class Setting:
    """How one of the two steps runs.

    Attributes:
        precision: "FP16", "BF16" or "FP32", by autocast; FP16 is emulated on a CPU. None for the model as it is.
        fp32_modules: modules in FP32, by name, glob or class.
    """

    precision: str | None = None
    fp32_modules: Sequence[str] = ()

    @classmethod
    def of(cls, options: Mapping[str, Any] | None, side: str) -> Setting:
        """From what `compare` was given as `a` or `b`.

        Raises:
            ConfigError: an option, or a precision, that there is not.
        """
        given, known = dict(options or {}), {"precision", "fp32_modules"}
        precision = given.get("precision")
        if given.keys() - known:
            raise ConfigError(f"{side}={given}: options are precision (FP16, BF16 or FP32) and fp32_modules.")
        if not (precision is None or str(precision).upper() in _MODES):
            raise ConfigError(
                f"precision {precision!r} of {side}: use FP16, BF16 or FP32; leave it out for the model as it is."
            )
        if isinstance(given.get("fp32_modules"), str):
            raise ConfigError(f"{side}={given}: fp32_modules is a list of names, globs or classes: ['lm_head'].")
        if precision is None and given.get("fp32_modules"):
            raise ConfigError(f"{side}={given}: fp32_modules are exceptions; add precision='FP16' or 'BF16'.")
        return cls(**given)

    @contextmanager
    def entered(self, model: nn.Module) -> Iterator[CurrentPrecision]:
        """The precision that `model` runs in, whatever a session gives it; its modules in FP32 are so inside of this context."""
        with nullcontext() if self.precision is None else without_its_precision(model), self._entered(model) as current:
            yield current

    @contextmanager
    def _entered(self, model: nn.Module) -> Iterator[CurrentPrecision]:
        device = next((p.device.type for p in model.parameters()), "cpu")
        mode = _MODES[(self.precision or "FP32").upper()]
        entry = PrecisionEntry(device, emulate=device == "cpu" and mode is PrecisionMode.MIXED)
        if not self.fp32_modules:
            current = CurrentPrecision(entry, mode)
            narrow = any(p.dtype in HALF_DTYPES for p in model.parameters())
            current.is_over = self.precision is None or (mode is PrecisionMode.FP32 and not narrow)
            yield current
            return
        runner = PlanRunner(entry, mode)
        runner.register_model(model)
        try:
            names = {pattern: runner.names_like(pattern) for pattern in self.fp32_modules}
            if unknown := [pattern for pattern, found in names.items() if not found]:
                raise ConfigError(
                    f"fp32_modules: no module is called {', '.join(unknown)}, by name, as a glob, or by its class."
                )
            chosen = [name for found in names.values() for name in found]
            runner.apply(PrecisionPlan(mode, dict.fromkeys(chosen, PrecisionMode.FP32)))
            yield runner.current
        finally:
            runner.remove()


@dataclass(frozen=True)
class Difference:
    """A tensor that differs by more than rounding explains.

    Attributes:
        module: whose doing it is; "" for what the model computes outside of its modules.
        direction: "forward", "backward", or "state" for a parameter or buffer.
        tensor: which one, in words.
        kind: "noise", "scale", "shift", "swapped order", "NaN", "wrong shape", "wrong dtype" or "raises".
        relative: 2-norm of the difference over that of A's tensor; inf where that is 0 or the kind has no size.
        bound: the same of what rounding explains.
    """

    module: str
    direction: str
    tensor: str
    kind: str
    relative: float = math.inf
    bound: float = 0.0

    @property
    def times_bound(self) -> float:
        """How many times as large as rounding explains."""
        return self.relative / self.bound if self.bound else math.inf

    def describe(self) -> str:
        """One phrase."""
        if self.kind == "NaN":
            return f"{self.tensor} has other elements that are inf, NaN or masked"
        if not math.isfinite(self.relative):
            return f"{self.tensor}: {self.kind}"
        times = f", {self.times_bound:.3g} times what rounding explains" if self.bound else ""
        kind = "" if self.kind == "noise" else f" ({self.kind})"
        return f"{self.tensor} differs{kind} by {self.relative:.2g} of its norm{times}"


@dataclass
class Comparison:
    """What `compare` has found.

    Attributes:
        first: where the two part; None where outputs and gradients agree.
        differences: all that differ: with both models at hand each by itself; of captures what follows from the first too.
        modules: those that differ by their own doing, in the order in which they run.
        state: parameters and buffers that differ.
        attributes: module → attribute → its value in A and in B, where they differ.
        facts: of A and of B, as plain data: precision, loss, versions, device.
        notes: what else there is to know, a sentence each.
        closest: the largest share of its bound that a tensor within it takes.
    """

    first: Difference | None = None
    differences: list[Difference] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    state: list[Difference] = field(default_factory=list)
    attributes: dict[str, dict[str, tuple[Any, Any]]] = field(default_factory=dict)
    facts: tuple[dict[str, Any], dict[str, Any]] = field(default_factory=lambda: ({}, {}))
    notes: list[str] = field(default_factory=list)
    closest: float = 0.0
    compared: int = 0

    @property
    def agrees(self) -> bool:
        """Whether no output or gradient differs by more than rounding explains."""
        return self.first is None

    @property
    def worst(self) -> list[Difference]:
        """The ten that are the most times as large as rounding explains."""
        return sorted(self.differences, key=lambda each: -each.times_bound)[:WORST]

    def why(self, module: str) -> str:
        """What is known of a module that differs: its parameters, buffers and attributes."""
        held = [each for each in self.state if each.module == module]
        parts = [f"{each.tensor} differs" + f" ({each.kind})" * (each.kind != "noise") for each in held]
        parts += [f"{name} is {a!r} in A and {b!r} in B" for name, (a, b) in self.attributes.get(module, {}).items()]
        return "; ".join(parts) or "its parameters, buffers and attributes are equal"

    def sentence(self) -> str:
        """The answer."""
        differ = [f"{each.module}.{each.tensor}" for each in self.state]
        state = f" {counted_names(differ)} differ." if differ else ""
        if (first := self.first) is None:
            near = f"; the nearest is at {self.closest:.2g} of its bound" if self.closest else ", to the last bit"
            return f"They agree: none of {self.compared} outputs and gradients differs by more than rounding explains{near}.{state}"
        others = [name or "the model itself" for name in self.modules[1:]]
        more = f" By their own doing differ as well: {join_names(others)}." if others else ""
        return f"They part in {first.module or 'the model itself'}, {first.direction}: {first.describe()}; {self.why(first.module)}.{more}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON; what is not finite is None."""
        plain = {"agrees": self.agrees, "sentence": self.sentence(), **asdict(self)}
        plain["differences"] = [asdict(each) for each in self.worst]
        return cast(dict[str, Any], _finite(plain))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def compare(
    model_a: nn.Module | str | Path,
    model_b: nn.Module | str | Path,
    batch: Mapping[str, Any] | Sequence[Any] | None = None,
    *,
    a: Mapping[str, Any] | None = None,
    b: Mapping[str, Any] | None = None,
) -> Comparison:
    """Runs the same step in two settings and says where they part, forward and backward, by module.

    `compare(model, model, batch, a={"precision": "FP32"}, b={"precision": "FP16"})` compares precisions;
    `compare(model, torch.compile(model), batch)` compiled code; two models may be two checkpoints or two implementations, whose
    modules are matched in order where their names differ. Nothing of the models changes, no gradient is written. Random numbers
    are the same in both. Costs six steps, and memory for all that goes through A's modules; reads the host.

    Args:
        model_a: what is taken for right, or a capture file. `step.safetensors` stands for those of all ranks, `step_rank0.safetensors`
            and so on, joined into the step of one process.
        model_b: what is compared with it, or a capture file. May be `model_a` itself.
        batch: the model's arguments, by name or in order, on any device; None where one of the two is a capture.
        a: `precision` ("FP16", "BF16", "FP32"; None for the model as it is) and `fp32_modules` (names, globs, classes).
        b: the same of B. Compared with a capture a model runs in the capture's precision unless told otherwise.

    Raises:
        ConfigError: an option is wrong, or there is no batch.
        AttachError: A's step cannot be run.
        StateError: a capture file cannot be read, is of another rank, or its batch is not known.
    """
    sides, settings = (model_a, model_b), (Setting.of(a, "a"), Setting.of(b, "b"))
    files = [load_capture(side) if isinstance(side, (str, Path)) else None for side in sides]
    if files[0] or files[1]:
        own, its = (
            file[0] if file else _traced_as(other, side, setting)
            for side, file, other, setting in zip(sides, files, files[::-1], settings, strict=True)
        )
        if (ranks := [trace.facts.get("rank", 0) for trace in (own, its)])[0] != ranks[1]:
            raise StateError(
                f"compare: captures of ranks {ranks[0]} and {ranks[1]}; pass one rank's, or all of a run, without _rank."
            )
        return _compared(own, its, _pairs(own, its), isolated=False)
    if batch is None:
        raise ConfigError(
            "compare(model_a, model_b): pass the batch, as the model takes it; only a capture file holds one."
        )
    return _Pair(model_a, model_b, batch, *settings).compared()  # type: ignore[arg-type]


def _traced_as(file: Any, model: Any, setting: Setting) -> Trace:
    """The captured step, on a model."""
    trace, forward_of = file
    if setting.precision is None and trace.facts.get("precision") in _MODES:
        setting = Setting(trace.facts["precision"], setting.fp32_modules or trace.facts.get("fp32_modules") or ())
    with setting.entered(model) as current:
        forward = forward_of(model)
        scale = trace.facts["scale"] if trace.facts.get("precision") == current.mode.value else None
        found = captured(forward, current, scale, trace.facts.get("rank", 0), from_each="starts" not in trace.facts)
        found.facts |= {"fp32_modules": sorted(setting.fp32_modules), "rank": trace.facts.get("rank", 0)}
        return found


class _Pair:
    """Two models, and the steps that they make on one batch."""

    def __init__(self, model_a: nn.Module, model_b: nn.Module, batch: Any, a: Setting, b: Setting) -> None:
        self._called = (model_a, model_b)
        self._models: tuple[nn.Module, nn.Module] = tuple(getattr(m, "_orig_mod", m) for m in self._called)  # type: ignore[assignment]
        self._settings, self._batch = (a, b), batch
        self._random = RandomState.now(devices_of(self._models[0]) | devices_of(self._models[1]))

    def _forward(self, side: int) -> RecordedForward:
        model = self._models[side]
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        batch = map_tensors(lambda x: x.to(device), self._batch)
        by_name = isinstance(batch, Mapping)
        return RecordedForward(model, () if by_name else tuple(batch), dict(batch) if by_name else {}, self._random)

    def _trace(self, side: int, eager: bool = True, **how: Any) -> Trace:
        forward = self._forward(side)
        with self._settings[side].entered(forward.model) as current:
            trace = trace_step(forward, Tracer(current, **how), self._scale, self._called[side], eager)
        trace.facts["fp32_modules"] = sorted(self._settings[side].fp32_modules)
        return trace

    def compared(self) -> Comparison:
        spacings, scales = [], []
        for side in (0, 1):
            with self._settings[side].entered(self._models[side]) as current:
                spacings.append(spacing_of(current, self._models[side]))
                scales.append(scale_for(self._forward(0), current))
        self._scale, spacing = max(scales, key=lambda s: s != 1.0), max(spacings)
        own = self._trace(0, keeps=True)
        if own.raised:
            raise AttachError(
                f"compare: A's step cannot be run ({own.raised[1]}, in {own.raised[0] or 'the model'}); pass a batch that it takes."
            )
        if any(map(_is_compiled, self._called)):
            mine, its = (self._trace(side, eager=False) for side in (0, 1))
            mine.measure(self._trace(0, noise=spacing), spacing)
            found = _compared(mine, its, _pairs(mine, its), isolated=False)
            found.notes.append("Of compiled code, outputs of the whole and gradients of parameters were compared.")
            eager = found if found.agrees else self._by_module(own, spacing)
            note = "Without torch.compile they agree" if eager.agrees else "Without torch.compile they differ as well"
            (found if eager.agrees else eager).notes += [] if found.agrees else [f"{note}, module by module."]
            return found if eager.agrees else eager
        return self._by_module(own, spacing)

    def _by_module(self, own: Trace, spacing: Spacing) -> Comparison:
        free = self._trace(1)
        pairs = _pairs(own, free)
        if free.raised:
            return _compared(own, free, pairs, isolated=False)
        own.measure(self._trace(0, forced=own.values.get, noise=spacing), spacing)
        alone = self._trace(1, forced=lambda key: own.values.get(pairs[key]) if key in pairs else None)
        if alone.raised:
            found = _compared(own, free, pairs, isolated=False)
            found.notes.append(
                f"B could not be run on A's values ({alone.raised[1]}): what differs may follow from what came before."
            )
            return found
        found = _compared(own, alone, pairs, isolated=True)
        found.facts[1]["loss"] = free.facts["loss"]
        return found


def _is_compiled(model: nn.Module) -> bool:
    return hasattr(model, "_orig_mod") or any(m._compiled_call_impl is not None for m in model.modules())


def _pairs(a: Trace, b: Trace) -> dict[Key, Key]:
    """B's key → A's: by name, or, where most names that B calls are unknown to A, in order of what modules return."""
    names = {call[:2] for call in a.calls}
    known = sum(call[:2] in names for call in b.calls)
    if 2 * known >= len(b.calls) and known:
        return {key: key for key in b.digests if key in a.digests}
    ours, theirs = _with_parameters(a), _with_parameters(b)
    matcher = difflib.SequenceMatcher(None, [each[1] for each in ours], [each[1] for each in theirs], autojunk=False)
    calls: dict[tuple[str, int], tuple[str, int]] = {("", 0): ("", 0)}
    for i, j, size in matcher.get_matching_blocks():
        calls |= {theirs[j + k][0]: ours[i + k][0] for k in range(size)}
    calls |= {(module, -1): (other, -1) for (module, _), (other, _) in reversed(list(calls.items()))}
    in_a, in_b = _grouped(a), _grouped(b)
    pairs: dict[Key, Key] = {}
    for (module, call, what), keys in in_b.items():
        others = in_a.get((*calls.get((module, call), ("", -2)), what), [])
        several = keys if call == -1 else keys[:1]
        pairs |= {k: o for k, o in zip(several, others, strict=False) if a.digests[o].shape == b.digests[k].shape}
    return pairs


def _with_parameters(trace: Trace) -> list[tuple[tuple[str, int], tuple[Any, int]]]:
    """The calls of modules with parameters, with what they return and how many parameters are in them."""
    held = [(key.module, math.prod(digest.shape)) for key, digest in trace.digests.items() if key.what == "parameter"]
    found = []
    for module, call, shapes in trace.calls:
        size = sum(n for name, n in held if name == module or name.startswith(f"{module}.") or not module)
        if size and shapes:
            found.append(((module, call), (shapes[0], size)))
    return found


def _grouped(trace: Trace) -> dict[tuple[str, int, str], list[Key]]:
    groups: dict[tuple[str, int, str], list[Key]] = defaultdict(list)
    for key, digest in sorted(trace.digests.items(), key=lambda item: item[0].path):
        if "float" in digest.dtype:
            groups[key[:3]].append(key)
    return groups


def _compared(a: Trace, b: Trace, pairs: Mapping[Key, Key], isolated: bool) -> Comparison:
    """The comparison of two traces.

    Args:
        isolated: whether every module of B was given what A's was.
    """
    result = Comparison(facts=(dict(a.facts), dict(b.facts)))
    by_a = {mine: theirs for theirs, mine in pairs.items()}
    if any(mine != theirs for theirs, mine in pairs.items()):
        calls = len({key[:2] for key in pairs if key.call >= 0})
        result.notes.append(
            f"Module names differ: {calls} of {len(b.calls)} calls were matched in order; names are A's."
        )
    result.notes += [note for side, trace in zip("AB", (a, b), strict=True) for note in _about_ranks(side, trace)]
    result.attributes = _attributes_that_differ(a, b, pairs)
    runs = [(trace.facts.get("precision"), list(trace.facts.get("fp32_modules") or ())) for trace in (a, b)]
    same = runs[0] == runs[1]
    scales = [float(trace.facts.get("scale") or 1.0) for trace in (a, b)]
    found: list[tuple[Key, Difference]] = []
    named = {key.module for key in by_a if key.call >= 0}
    for key, digest in a.digests.items():
        other = by_a.get(key)
        if other is None:
            continue
        of_gradient = key.what.endswith("gradient")
        its = b.digests[other]
        if digest.shape != its.shape:
            one, its_one = a.in_one_rank.get(key, digest), b.in_one_rank.get(other, its)
            by_rows = one.shape == its_one.shape and key.call >= 0
            if by_rows and of_gradient:
                continue  # it adds up over the ranks, and its sketches do not
            digest, its = (one, its_one) if by_rows else (digest, its)
        ours, theirs = (
            d.times(1 / s) if of_gradient and s != 1.0 else d for d, s in zip((digest, its), scales, strict=True)
        )
        if key.what in ("parameter", "buffer"):
            spacing = max(_spacing(ours), _spacing(theirs)) if ours.dtype != theirs.dtype else 0.0
            if (kind := kind_of(ours, theirs, spacing * ours.norm)) and kind[0] != "wrong dtype":
                result.state.append(Difference(key.module, "state", key.path, *kind))
            continue
        result.compared += 1
        moved = a.deviations.get(key, 0.0), b.deviations.get(other, 0.0)
        bound = FACTOR * max(m / (s if of_gradient else 1.0) for m, s in zip(moved, scales, strict=True))
        kind = kind_of(ours, theirs, bound, same)
        if kind is None:
            if distance := ours.distance(theirs):
                result.closest = max(result.closest, distance / bound)
            continue
        module = a.callers.get(key[:2], "") if key.what in ("input", "output gradient") else key.module
        words = f"{key.what} of {key.path}" if key.call < 0 else f"{key.what} of {key.module or 'the model'}"
        found.append((key, Difference(module, "backward" if of_gradient else "forward", words, *kind)))
    first_forward = [each for each in found if each[1].direction == "forward"]
    if not isolated and first_forward:
        found = first_forward
    result.differences = [difference for _, difference in found]
    if b.raised and not found:
        result.differences = [Difference(b.raised[0], "forward", b.raised[1], "raises")]
    if result.differences:
        result.first = _with_state(result.differences[0], result.state, named)
        spoilt = {key[:2] for key, each in found if key.what == "input" and each.kind == "NaN"}
        own = [each for key, each in found if each.kind != "NaN" or not (key[:2] in spoilt and key.what == "output")]
        own = [each for each in own if each.kind != "NaN" or each.direction == "forward" or not first_forward]
        alone = [each for each in own if isolated or each.kind == "NaN"]
        sources = [result.first, *(_with_state(each, result.state, named) for each in alone)]
        result.modules = list(dict.fromkeys(each.module for each in sources))
    return result


def _about_ranks(side: str, trace: Trace) -> Iterator[str]:
    """What there is to know of joined ranks, a sentence each."""
    if trace.in_one_rank:
        yield (
            f"{side} is {trace.facts['ranks']} ranks, joined: their batches one after the other, the mean of their losses. Where a "
            "model draws random numbers, as dropout does, each rank has drawn its own."
        )
    if apart := trace.facts.get("apart"):
        yield f"The ranks of {side} differ among themselves in {counted_names(apart)}."


def _with_state(found: Difference, state: Sequence[Difference], called: set[str]) -> Difference:
    """`found`, of the module whose weights differ where its caller uses these without calling it."""
    if any(each.module == found.module for each in state):
        return found
    inside = f"{found.module}." if found.module else ""
    owners = {each.module for each in state if each.module.startswith(inside) and each.module not in called}
    if len(owners) != 1:
        return found
    return Difference(owners.pop(), found.direction, found.tensor, found.kind, found.relative, found.bound)


def _attributes_that_differ(a: Trace, b: Trace, pairs: Mapping[Key, Key]) -> dict[str, dict[str, tuple[Any, Any]]]:
    modules = {mine.module: theirs.module for theirs, mine in pairs.items()}
    modules |= {name: name for name in a.attributes.keys() & b.attributes.keys() if name not in modules}
    found = {}
    for mine, theirs in modules.items():
        ours, its = a.attributes.get(mine, {}), b.attributes.get(theirs, {})
        differ = {n: (ours[n], its[n]) for n in ours if n in its and ours[n] != its[n]}
        if differ and (mine == theirs or "class" not in differ):
            found[mine] = differ
    return found


def _spacing(digest: Digest) -> float:
    dtype = getattr(torch, digest.dtype)
    return float(torch.finfo(dtype).eps) if dtype.is_floating_point else 0.0


def kind_of(a: Digest, b: Digest, bound: float, same_dtype: bool = True) -> tuple[str, float, float] | None:
    """What kind of difference there is between two tensors, its 2-norm and the bound's, both over A's norm; None where none.

    Args:
        bound: 2-norm of what rounding explains.
        same_dtype: whether another dtype is a difference.
    """
    if a.shape != b.shape:
        return f"wrong shape ({a.shape} in A, {b.shape} in B)", math.inf, 0.0
    if not torch.equal(a.figures[:3], b.figures[:3]):
        return "NaN", math.inf, 0.0
    norm, distance = a.norm, a.distance(b)
    if same_dtype and a.dtype != b.dtype:
        return "wrong dtype", distance / norm if norm else math.inf, bound / norm if norm else 0.0
    if distance <= bound:
        return None
    return (
        _kind(a, b, distance, bound, same_dtype),
        distance / norm if norm else math.inf,
        bound / norm if norm else 0.0,
    )


def _kind(a: Digest, b: Digest, distance: float, bound: float, same_dtype: bool) -> str:
    enough = max(bound, 0.02 * distance)  # what may be left over by an explanation
    x, y = a.figures[8:], b.figures[8:]
    factor = float(x @ y) / (float(x @ x) or 1.0)
    if float(torch.linalg.vector_norm(y - factor * x)) <= enough:
        return f"scale ({factor:.4g} times)"
    count = math.prod(a.shape)
    ones = Digest.of(torch.ones(a.shape, device="cpu")).figures[8:]
    shift = float(b.figures[3] - a.figures[3]) / max(1, count)
    if float(torch.linalg.vector_norm(y - x - shift * ones)) <= enough:
        return f"shift (by {shift:.4g})"
    if _is_permuted(a, b, distance):
        return "swapped order"
    sample, own = (b.sample, a.sample)
    for dtype in (torch.bfloat16, torch.float16) if same_dtype else ():
        if torch.equal(sample.to(dtype).float(), sample) and not torch.equal(own.to(dtype).float(), own):
            return "wrong dtype (rounded to " + ("BF16)" if dtype is torch.bfloat16 else "FP16)")
    return "noise"


def _is_permuted(a: Digest, b: Digest, distance: float) -> bool:
    """Whether all that does not depend on the order of elements is equal."""
    if distance < 1e-3 * a.norm:
        return False
    size = float(a.figures[6:8].abs().max())
    scales = torch.tensor(
        [math.sqrt(math.prod(a.shape)) * a.norm, a.norm**2, a.norm**2 * size, size, size], device="cpu"
    )
    return bool(((a.figures[3:8] - b.figures[3:8]).abs() <= 1e-5 * scales).all())
