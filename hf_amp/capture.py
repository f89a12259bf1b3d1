"""A step as it can be compared: digests of what goes through every module, forward and backward, and the file that holds them.

A digest of a tensor is its shape and dtype, eight moments, a sketch (256 sums of elements with fixed random signs, whose
distance estimates that of the tensors, Charikar, Chen and Farach-Colton 2002) and a sample of elements. A capture file is one
safetensors file: digests, the batch, the states of random generators, and, as JSON in its header, names, versions and what
rounding was measured to do. No code is run from it.
"""

from __future__ import annotations

import functools
import json
import math
import platform
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from hf_amp.device import RandomState, devices_of, products_use_tf32
from hf_amp.errors import StateError, in_one_line
from hf_amp.fallback.module_precision import (
    CurrentPrecision,
    ForwardContext,
    holds_shards,
    is_unit,
    recovers,
    to_float32,
)
from hf_amp.fallback.operators import graph_of
from hf_amp.fallback.recorder import RecordedForward
from hf_amp.fallback.replay import float_tensors, hooks_silent, inputs_to_repeat, nothing_changes, starts_of
from hf_amp.fallback.replay import non_finite_tensors as bad_tensors
from hf_amp.fallback.sharded import GatheredGradients, Lockstep, needs_others
from hf_amp.patch_log import takes_hooks
from hf_amp.precision import FP16_FORMAT, FP32_FORMAT, HALF_DTYPES, PrecisionMode
from hf_amp.statistics import is_sharded
from hf_amp.tree import map_tensors, tensors_in

BUCKETS = 256
"""Of a sketch: its estimate of a squared distance is off by a factor of 1 ± sqrt(2 / BUCKETS)."""
PERIOD = 65_537
"""Signs of a sketch repeat after so many elements; a prime, so that rows of a power of two meet other signs."""
SAMPLE = 1024
MOST_BYTES = 2**26
"""Of a capture file, but for the batch; samples get smaller where there are more tensors."""
FILE_VERSION = 1
_MOMENTS = 8
_PLAIN = (bool, int, float, str, type(None))


@functools.lru_cache(maxsize=8)
def _signs(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(0, 2, (PERIOD,), generator=generator, dtype=torch.int8, device="cpu") * 2 - 1).to(device)


class Digest(NamedTuple):
    """What is kept of a tensor.

    `figures`, shape [8 + BUCKETS], float64: how many elements are NaN, inf, and -inf or the least of the dtype (a mask); of the
    others sum, sum of squares, sum of cubes, least, largest; the sketch. `sample`, float32: at most `SAMPLE` at equal distances.
    """

    shape: tuple[int, ...]
    dtype: str
    figures: Tensor
    sample: Tensor

    @classmethod
    def of(cls, tensor: Tensor, size: int = SAMPLE, rank: int = 0) -> Digest:
        """On the tensor's device; no GPU-CPU sync. With a `rank` the sketch is that part of one of a tensor of which the ranks
        before hold as much each: theirs add up to its sketch.
        """
        x = tensor.detach().flatten()
        x = torch.view_as_real(x).flatten() if x.is_complex() else x
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            floats = x.is_floating_point()
            masked = (x <= torch.finfo(x.dtype).min) if floats else torch.zeros_like(x, dtype=torch.bool)
            y = x.to(wide)
            odd = torch.stack([y.isnan().sum(), y.isposinf().sum(), masked.sum()]).to(wide)
            y = y.where(y.isfinite() & ~masked, 0.0) if floats else y
            ends = torch.stack([y.min(), y.max()]) if y.numel() else y.new_zeros(2)
            squares = y * y
            sums = torch.stack([y.sum(), squares.sum(), (squares * y).sum()])
            before = rank * y.numel()
            signs = _signs(x.device).roll(-(before % PERIOD)).repeat(-(-y.numel() // PERIOD))[: y.numel()]
            signed = nn.functional.pad(y * signs, (0, -y.numel() % BUCKETS))
            figures = torch.cat([odd, sums, ends, signed.view(-1, BUCKETS).sum(0).roll(before % BUCKETS)])
            at = torch.arange(min(size, y.numel()), device=x.device) * y.numel() // max(1, min(size, y.numel()))
            return cls(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), figures, x[at].float())

    def to_host(self) -> Digest:
        """The same on the CPU, in float64."""
        return self._replace(figures=self.figures.cpu().double(), sample=self.sample.cpu())

    def times(self, factor: float) -> Digest:
        """Of the tensor times `factor`, which is above 0."""
        powers = self.figures.new_tensor([0, 0, 0, 1, 2, 3, 1, 1] + [1] * BUCKETS)
        return self._replace(figures=self.figures * factor**powers, sample=self.sample * factor)

    @property
    def norm(self) -> float:
        """The 2-norm of the finite elements."""
        return math.sqrt(float(self.figures[4]))

    def distance(self, other: Digest) -> float:
        """Estimate of the 2-norm of the difference; exactly 0 where the tensors are equal."""
        return float(torch.linalg.vector_norm(self.figures[_MOMENTS:] - other.figures[_MOMENTS:]))


class Spacing(NamedTuple):
    """What rounding to a format does: the spacing of its numbers at one, and of the smallest ones."""

    eps: float
    least: float


class Key(NamedTuple):
    """Where a tensor is: a module's name ("" is the model), which of its calls (-1: none), what it is to it, and inside of what.

    `what`: "input", "output", "output gradient", "input gradient" (this module's part of it), "parameter gradient",
    "parameter" or "buffer".
    """

    module: str
    call: int
    what: str
    path: str


@dataclass
class Trace:
    """One step of one model.

    Attributes:
        digests: of every tensor, in the order in which they were made.
        callers: (module, call) → the module whose forward called it.
        calls: (module, call, shapes returned), in the order in which they returned.
        attributes: module → its public attributes that are numbers, flags or text, and its class.
        values: the tensors themselves, where they were asked for.
        deviations: the 2-norm by which rounding was measured to move each tensor; empty where it was not.
        in_one_rank: of joined ranks, the digests of the first one, for what does not go by rows of the batch.
        facts: versions, precision, loss and the like, as plain data.
        raised: module and exception that ended the step; None where none did.
    """

    digests: dict[Key, Digest] = field(default_factory=dict)
    callers: dict[tuple[str, int], str] = field(default_factory=dict)
    calls: list[tuple[str, int, tuple[tuple[int, ...], ...]]] = field(default_factory=list)
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    values: dict[Key, Tensor] = field(default_factory=dict)
    deviations: dict[Key, float] = field(default_factory=dict)
    in_one_rank: dict[Key, Digest] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    raised: tuple[str, str] | None = None

    def measure(self, perturbed: Trace, noise: Spacing) -> None:
        """Sets `deviations`: how far `perturbed`, the same step with noise, is from this one, and a rounding more."""
        for key, digest in self.digests.items():
            other = perturbed.digests.get(key)
            moved = digest.distance(other) if other and other.shape == digest.shape else 0.0
            least = noise.least * math.sqrt(math.prod(digest.shape))
            self.deviations[key] = moved + noise.eps * digest.norm + least


class _Watched(torch.autograd.Function):
    """Passes on a tensor, or another in its place, and in backward what `note` makes of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, instead: Tensor | None, note: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.note = note
        return (x if instead is None else instead).clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return ctx.note(gradients[0]), None, None


class _Call(NamedTuple):
    module: str
    number: int
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class Tracer:
    """Hooks on all modules of a model that is run once, which fill a `Trace`.

    Args:
        current: the precision; where an output leaves its range from inputs that do not, the step goes on with FP32's.
        forced: what every module takes, returns, and gets as gradients, in place of its own, by key, so that each is seen by
            itself; None for a free run.
        noise: size of random changes to what modules return, and, where it is forced, to what they take.
        keeps: whether the tensors themselves are kept.
        size: of samples.
        rank: whose part of a batch it is; see `join_ranks`.
    """

    def __init__(
        self,
        current: CurrentPrecision,
        forced: Callable[[Key], Tensor | None] | None = None,
        noise: Spacing | None = None,
        keeps: bool = False,
        size: int = SAMPLE,
        rank: int = 0,
    ) -> None:
        self.trace = Trace()
        self._rank = rank
        self._current, self._forced, self._noise, self._keeps, self._size = current, forced, noise, keeps, size
        self._stack: list[_Call] = []
        self._numbers: Counter[str] = Counter()
        self._paused = False
        self._generators: dict[torch.device, torch.Generator] = {}

    def note(self, key: Key, x: Tensor) -> None:
        """Adds the digest of `x`."""
        if not (x.is_sparse or x.is_meta or is_sharded(x)):
            self.trace.digests[key] = Digest.of(x, self._size, self._rank if key.call >= 0 else 0)
            if self._keeps:
                self.trace.values[key] = x.detach().clone()

    def before(self, name: str, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """A forward pre-hook."""
        if self._paused:
            return None
        number = self._numbers[name]
        self._numbers[name] += 1
        self.trace.callers[name, number] = self._stack[-1].module if self._stack else ""
        given = self._watched(name, number, "input", (arguments, options))
        self._stack.append(_Call(name, number, *given))
        return given

    def after(self, module: nn.Module, arguments: Any, options: Any, output: Any) -> Any:
        """A forward hook."""
        if self._paused:
            return None
        call, exact = self._stack.pop(), None
        shapes = tuple(tuple(x.shape) for _, x in tensors_in(output) if x.is_floating_point())
        self.trace.calls.append((call.module, call.number, shapes))
        half = self._current.mode.number_format is not FP32_FORMAT and not self._current.is_over
        if half and self._forced is None and call.module and self._leaves_range(module, output):
            exact = self._in_fp32(module, call)
            for path, x in tensors_in(output) if exact is not None else ():
                self.note(Key(call.module, call.number, "output", path), x)
        return self._watched(call.module, call.number, "output", output if exact is None else exact, exact is None)

    def _leaves_range(self, module: nn.Module, output: Any) -> bool:
        """Whether `output` does; that of any rank, where all have to gather what is in the module."""
        together, here = Lockstep.now(), bool(bad_tensors(output))
        return here if together is None or not needs_others(module) else together.anyone(here)

    def _in_fp32(self, module: nn.Module, call: _Call) -> Any:
        """What the module returns in FP32 where that is finite."""
        self._paused = True
        try:
            with ForwardContext.suspended(), self._current.entry.context(PrecisionMode.FP32):
                exact = module(*to_float32(call.arguments), **to_float32(call.options))
        finally:
            self._paused = False
        return None if bad_tensors(exact) else exact

    def _watched(self, name: str, number: int, what: str, value: Any, notes: bool = True) -> Any:
        paths = {id(x): path for path, x in reversed(list(tensors_in(value)))}
        done: dict[int, Tensor] = {}  # what is one object stays one

        def watch(x: Tensor) -> Tensor:
            if id(x) not in done:
                done[id(x)] = self._watch(Key(name, number, what, paths.get(id(x), "")), x, notes)
            return done[id(x)]

        return map_tensors(watch, value)

    def _watch(self, key: Key, x: Tensor, notes: bool) -> Tensor:
        if notes:
            self.note(key, x)
        elif self._keeps:
            self.trace.values[key] = x.detach().clone()
        instead = self._instead(key, x)
        if not (x.requires_grad and torch.is_grad_enabled()):
            return x if instead is None else instead.clone()
        of_gradient = key._replace(what=f"{key.what} gradient")

        def note(gradient: Tensor) -> Tensor:
            self.note(of_gradient, gradient)
            other = self._instead(of_gradient, gradient)
            return gradient if other is None else other

        return cast(Tensor, _Watched.apply(x, instead, note))  # type: ignore[no-untyped-call]

    def _instead(self, key: Key, x: Tensor) -> Tensor | None:
        """What goes on in place of `x`, of its dtype unless that lacks the range; None for itself."""
        value = self._forced(key) if self._forced else None
        value = None if value is None or value.shape != x.shape else value.to(x.device)
        if value is not None and x.dtype in HALF_DTYPES and value.is_floating_point() and value.dtype != x.dtype:
            masked, narrow = value <= torch.finfo(value.dtype).min, value.to(x.dtype)
            beyond = bool((value.isfinite() & ~narrow.isfinite() & ~masked).any())
            value = value if beyond else torch.where(masked, x, narrow)
        elif value is not None:
            value = value.to(x.dtype)
        if self._noise and x.is_floating_point() and (self._forced is not None or key.what.startswith("output")):
            value = self._noisy(x.detach() if value is None else value, self._noise)
        return value

    def _noisy(self, x: Tensor, noise: Spacing) -> Tensor:
        if x.device not in self._generators:
            self._generators[x.device] = torch.Generator(x.device).manual_seed(1)
        with torch.autocast(x.device.type, enabled=False):
            wide = x.double() if x.dtype == torch.float64 else x.float()
            signs = (
                torch.rand(x.shape, generator=self._generators[x.device], device=x.device).lt(0.5).to(wide.dtype) * 2
                - 1
            )
            moved = (wide + signs * (noise.eps * wide + noise.least)).to(x.dtype)
            return torch.where(x.abs() < torch.finfo(x.dtype).max / 2, moved, x)

    def watching(self, model: nn.Module, root: nn.Module) -> Iterator[Any]:
        """Handles of hooks on all modules but those inside of compiled ones, whose code would not call them."""
        compiled = [n for n, m in model.named_modules() if m is not root and m._compiled_call_impl is not None]
        hidden = [*compiled, *([""] if root is not model or root._compiled_call_impl is not None else [])]
        for name, module in [("", root), *[each for each in model.named_modules() if each[0]]]:
            if name and any(name == each or name.startswith(f"{each}." if each else "") for each in hidden):
                continue
            if takes_hooks(module) and not (name == "" and root._compiled_call_impl is not None):
                yield module.register_forward_pre_hook(functools.partial(self.before, name), with_kwargs=True)
                yield module.register_forward_hook(self.after, with_kwargs=True)

    @property
    def running(self) -> str:
        """The innermost module that has not returned."""
        return self._stack[-1].module if self._stack else ""


class _Gathered(GatheredGradients):
    """Parameters that FSDP2 has gathered, and this rank's own gradients of them, which a tracer notes as they come."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def _note(self, prefix: str, unit: nn.Module, *given: Any) -> None:
        for name, p in unit.named_parameters(prefix):
            self._tracer.note(_key_of(name, "parameter"), p)
        super()._note(prefix, unit, *given)

    def _look(self, name: str, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            self._tracer.note(_key_of(name, "parameter gradient"), gradient)


NOT_CAPTURED = (
    "its step cannot be repeated, as parameters are sharded by other means than FSDP2, or over several axes; capture a run whose model "
    "is whole on each rank, or compare checkpoints with `hf-amp diff`."
)


def can_be_captured(model: nn.Module) -> bool:
    """Whether each rank sees whole parameters in a forward pass, and rows of its own: not in FSDP1, nor tensor parallel."""
    axes = [sum(not p.is_replicate() for p in cast(Any, x).placements) for x in model.parameters() if is_sharded(x)]
    return not holds_shards(model) or (recovers(model) and any(map(is_unit, model.modules())) and max(axes) == 1)


def trace_step(
    forward: RecordedForward,
    tracer: Tracer,
    scale: float = 1.0,
    called: nn.Module | None = None,
    eager: bool = True,
    from_each: bool = False,
) -> Trace:
    """Runs one forward and backward of `forward.model` on its batch under the hooks of `tracer`; nothing of the model changes.

    Backward begins from what the recorded step's loss gave to the outputs; else from the loss that the model returns; else from
    the same random numbers at every output. Gradients are not written into `.grad`. Memory: a copy of what goes through each
    module until backward has run.

    Args:
        scale: what the loss is multiplied by; digests are of the scaled gradients.
        called: what is called in the model's place, such as the compiled module around it.
        eager: whether compiled code is run by Python, so that its modules can be watched.
        from_each: whether backward begins also at outputs whose gradient came through another one, so that it counts twice: captures
            without `starts` among their facts did so.

    Raises:
        RuntimeError: parameters are sharded and ranks are not in `Lockstep`, or the batch was written into since.
    """
    model, root = forward.model, forward.model if called is None else called
    trace, parameters = tracer.trace, {n: p for n, p in forward.model.named_parameters() if p.requires_grad}
    trace.attributes = {name: _attributes(module) for name, module in model.named_modules()}
    for what, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, x in tensors:
            tracer.note(_key_of(name, what), x)
    with ExitStack() as stack:
        stack.enter_context(nothing_changes(model, gradients=True))
        stack.enter_context(hooks_silent(list(parameters.values())))
        if not eager:
            stack.enter_context(torch.compiler.set_stance("default"))
        for module in model.modules():
            if vars(module).get("gradient_checkpointing") is True:
                module.gradient_checkpointing = False  # type: ignore[assignment]  # it would run modules once more
        gathered = _Gathered(tracer) if holds_shards(model) else None
        stack.enter_context(gathered.watching(model) if gathered else nullcontext())
        for handle in tracer.watching(model, model if eager else root):
            stack.callback(handle.remove)
        try:
            arguments, options = inputs_to_repeat(forward)
            if forward.random_state is not None:
                forward.random_state.restore()
            with tracer._current():
                output = (model if eager else root)(*arguments, **options)
            pairs = _starts(output, forward, scale, from_each)
            if gathered:
                gathered.backward(pairs, output)
            elif pairs:
                ends, seeds = zip(*pairs, strict=True)
                found = torch.autograd.grad(ends, list(parameters.values()), seeds, allow_unused=True)
                for (name, _), gradient in reversed(list(zip(parameters.items(), found, strict=True))):
                    if gradient is not None:
                        tracer.note(_key_of(name, "parameter gradient"), gradient)
        except Exception as error:  # whatever the model raises on this batch
            if gathered:
                raise  # on all ranks
            trace.raised = (tracer.running, in_one_line(error))
            output = None
    numbers = [x.detach() for _, x in float_tensors(output) if x.dim() == 0]
    trace.digests = {key: digest.to_host() for key, digest in trace.digests.items()}
    trace.facts |= {"loss": float(numbers[0]) if numbers else None, "scale": scale, **_facts(model, tracer._current)}
    trace.facts |= {} if from_each else {"starts": "once"}
    return trace


def _starts(output: Any, forward: RecordedForward, scale: float, from_each: bool) -> list[tuple[Tensor, Tensor]]:
    if forward.output_gradients:
        kept = forward.output_gradients if from_each else _own_gradients(output, forward.output_gradients)
        return starts_of(output, forward._replace(output_gradients=kept), scale, 1.0)[0]
    outputs = [x for _, x in float_tensors(output) if x.requires_grad]
    if numbers := [x for x in outputs if x.dim() == 0]:
        return [(numbers[0], torch.full_like(numbers[0], scale))]
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(2), device="cpu")
    return [(x, (draw(x.shape) * (scale / math.sqrt(max(1, x.numel())))).to(x)) for x in outputs]


def _own_gradients(output: Any, given: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Of what came to outputs, what did not come through another one, as that of logits through the loss: it would count twice."""
    starts = {path: x.grad_fn for path, x in float_tensors(output) if x.requires_grad and given.get(path) is not None}
    nodes = {path: _without_watch(node) for path, node in starts.items()}
    behind = {path: {node for node, _ in graph_of([start])} for path, start in nodes.items()}
    through = {path for path, node in nodes.items() if sum(node in its for its in behind.values()) > 1}
    return {path: gradient for path, gradient in given.items() if path not in through}


def _without_watch(node: Any) -> Any:
    """The node that a tracer watches with `node`."""
    while node is not None and node.name() == "_WatchedBackward":
        node = node.next_functions[0][0]
    return node


def _key_of(parameter: str, what: str) -> Key:
    module, _, name = parameter.rpartition(".")
    return Key(module, -1, what, name)


def _attributes(module: nn.Module) -> dict[str, Any]:
    own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    plain = {name: value for name, value in own.items() if isinstance(value, (bool, int, float, str))}
    return {"class": _class_of(module), **plain}


def _class_of(module: nn.Module) -> str:
    """Without what FSDP2 has made of it."""
    return (type(module).__bases__[-1] if is_unit(module) else type(module)).__name__


def _facts(model: nn.Module, current: CurrentPrecision) -> dict[str, Any]:
    known = {name: sys.modules.get(name) for name in ("hf_amp", "torch", "transformers", "accelerate")}
    versions = {name: str(cast(Any, module).__version__) for name, module in known.items() if module}
    narrow = any(p.dtype in HALF_DTYPES for p in model.parameters())
    return {
        "model": _class_of(model),
        "precision": "as it is" if current.is_over and narrow else current.mode.value,
        "emulated": current.entry.emulate and not current.is_over,
        "device": ", ".join(sorted(map(str, devices_of(model)))),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **versions},
    }


def spacing_of(current: CurrentPrecision, model: nn.Module) -> Spacing:
    """That of the coarsest format that a run computes in; TF32's (NVIDIA: 10 bits) where products run in it."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point() and p.element_size() > 1}
    if not current.is_over:
        dtypes.add(current.mode.number_format.dtype)
    formats = [Spacing(f.eps, f.smallest_normal * f.eps) for f in map(torch.finfo, dtypes or {torch.float32})]
    if any(device.type == "cuda" for device in devices_of(model)) and products_use_tf32():
        formats.append(Spacing(2.0**-10, 0.0))
    return max(formats)


def scale_for(forward: RecordedForward, current: CurrentPrecision) -> float:
    """1 but in FP16: there the power of two that brings FP32's largest gradient to within 2 bits of the range."""
    if current.is_over or current.mode.number_format is not FP16_FORMAT:
        return 1.0
    exact = trace_step(forward, Tracer(CurrentPrecision(current.entry, PrecisionMode.FP32), size=1))
    gradients = [d for key, d in exact.digests.items() if key.what.endswith("gradient")]
    largest = max((float(d.figures[6:8].abs().max()) for d in gradients), default=0.0)
    return 2.0 ** max(-24, min(24, math.floor(math.log2(FP16_FORMAT.largest / largest)) - 2)) if largest else 1.0


def captured(
    forward: RecordedForward,
    current: CurrentPrecision,
    scale: float | None = None,
    rank: int = 0,
    from_each: bool = False,
) -> Trace:
    """A trace of the step in a free run, with what rounding was measured to do: two steps, one of them perturbed.

    After TTrace (arXiv 2506.09280): noise of the format's spacing at what every module returns, and its gradient, goes through
    the rest of the step and shows by how much rounding moves what comes after. Costs a third step in FP16 without `scale`.
    """
    noise = spacing_of(current, forward.model)
    scale = scale_for(forward, current) if scale is None else scale
    trace = trace_step(forward, Tracer(current, rank=rank), scale, from_each=from_each)
    if trace.raised is None:
        noisy = trace_step(forward, Tracer(current, noise=noise, rank=rank), scale, from_each=from_each)
        trace.measure(noisy, noise)
    return trace


def unscaled(forward: RecordedForward, scale: float) -> RecordedForward:
    """`forward`, with what a loss times `scale` gave to its outputs divided by it, in FP32."""
    given = {at: None if g is None else g.float() / scale for at, g in forward.output_gradients.items()}
    return forward._replace(output_gradients=given)


def save_capture(trace: Trace, forward: RecordedForward, path: str | Path, **facts: Any) -> Path:
    """Writes `trace`, and the batch of `forward` with its random state, into one safetensors file; returns where.

    Takes at most `MOST_BYTES` and the batch. Plain arguments that are no tensors are kept where JSON can hold them.
    """
    from safetensors.torch import save_file

    path = Path(path)
    room = MOST_BYTES // (4 * max(1, len(trace.digests))) - 2 * (_MOMENTS + BUCKETS)
    samples = [digest.sample[: max(1, room)] for digest in trace.digests.values()]
    batch = {**{str(i): x for i, x in enumerate(forward.arguments)}, **forward.options}
    plain = {name: x if isinstance(x, _PLAIN) else f"<{type(x).__name__}>" for name, x in batch.items()}
    held = {f"batch {name}": x for name, x in batch.items() if isinstance(x, Tensor)}
    held |= {f"start {name}": g.float() for name, g in forward.output_gradients.items() if g is not None}
    if (state := forward.random_state) is not None:
        held |= {"random cpu": state.cpu, **{f"random {device}": x for device, x in state.others.items()}}
    tensors = {name: x.detach().cpu().contiguous().clone() for name, x in held.items()}
    tensors["figures"] = torch.stack([digest.figures for digest in trace.digests.values()])
    tensors["samples"] = torch.cat(samples)
    rows = [
        (*key, list(d.shape), d.dtype, len(s), trace.deviations.get(key, 0.0))
        for (key, d), s in zip(trace.digests.items(), samples, strict=True)
    ]
    header = {
        "version": FILE_VERSION,
        "tensors": rows,
        "callers": [[*call, caller] for call, caller in trace.callers.items()],
        "calls": trace.calls,
        "attributes": trace.attributes,
        "arguments": {name: x for name, x in plain.items() if f"batch {name}" not in held},
        "raised": trace.raised,
        "facts": {**trace.facts, **facts},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"hf_amp capture": json.dumps(header)})
    return path


def rank_files(path: Path) -> list[Path]:
    """What the ranks of a run have written where one process would have written `path`, in order."""
    found = [(int(n), each) for each in path.parent.glob(f"{path.stem}_rank*{path.suffix}") if (n := _rank_in(each))]
    return [each for _, each in sorted(found)]


def _rank_in(path: Path) -> str:
    number = path.stem.rpartition("_rank")[2]
    return number if number.isdecimal() else ""


def load_capture(path: str | Path) -> tuple[Trace, Callable[[nn.Module], RecordedForward]]:
    """The trace in a capture file, and what makes the captured step of a model, on the model's device.

    Where there is no such file but those of ranks (`step_rank0.safetensors` and so on for `step.safetensors`), theirs joined.

    Raises:
        StateError: it is no capture file, or damaged, or ranks do not fit together. The second raises it where the batch holds
            what JSON and tensors do not.
    """
    path = Path(path)
    if not path.is_file() and (files := rank_files(path)):
        parts = [_loaded(file) for file in files]
        trace = join_ranks([trace for trace, *_ in parts], str(path))
        tensors = _joined_batch([tensors for _, tensors, _ in parts], str(path))
        return trace, functools.partial(_forward_of, str(path), tensors, parts[0][2])
    trace, tensors, plain = _loaded(path)
    return trace, functools.partial(_forward_of, str(path), tensors, plain)


def _loaded(path: Path) -> tuple[Trace, dict[str, Tensor], dict[str, Any]]:
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            if "hf_amp capture" not in (known := file.metadata() or {}):
                raise ValueError("it holds other tensors")
            header = json.loads(known["hf_amp capture"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        if header["version"] != FILE_VERSION:
            raise ValueError(f"it is of version {header['version']}, and this hf_amp reads {FILE_VERSION}")
        trace = Trace(facts=dict(header["facts"]), raised=tuple(header["raised"]) if header["raised"] else None)
        samples = tensors["samples"].split([row[6] for row in header["tensors"]])
        for row, figures, sample in zip(header["tensors"], tensors["figures"], samples, strict=True):
            key = Key(str(row[0]), int(row[1]), str(row[2]), str(row[3]))
            trace.digests[key] = Digest(tuple(row[4]), str(row[5]), figures, sample)
            trace.deviations[key] = float(row[7])
            if figures.shape != (_MOMENTS + BUCKETS,):
                raise ValueError(f"figures of shape {tuple(figures.shape)}")
        trace.callers = {(str(name), int(call)): str(caller) for name, call, caller in header["callers"]}
        trace.calls = [(str(n), int(c), tuple(tuple(s) for s in shapes)) for n, c, shapes in header["calls"]]
        trace.attributes = {str(name): dict(its) for name, its in header["attributes"].items()}
    except Exception as error:  # safetensors, JSON and the system raise of many kinds
        raise StateError(
            f"{path}: is no capture, or damaged ({in_one_line(error)}); make one with `hf-amp capture` or session.capture."
        ) from error
    return trace, tensors, dict(header["arguments"])


def join_ranks(parts: Sequence[Trace], what: str) -> Trace:
    """The step of one process that has the batches of all ranks, one after the other, and the mean of their losses.

    That mean is what DistributedDataParallel makes, which averages gradients. It equals a mean over the whole batch where each rank
    has as many elements in its loss. Of the gradients of parameters least, largest and cubes are not known, and NaN.

    Raises:
        StateError: a rank is missing, or ranks have other shapes.
    """
    first, count = parts[0], len(parts)
    ranks = [(trace.facts.get("rank"), trace.facts.get("ranks")) for trace in parts]
    if ranks != [(rank, count) for rank in range(count)]:
        raise StateError(
            f"{what}: captures of ranks 0 to {count - 1} of {count} belong together; these are of {ranks}."
        )
    result = Trace(callers=first.callers, calls=first.calls, attributes=first.attributes, raised=first.raised)
    apart = []
    for key, digest in first.digests.items():
        if any(key not in trace.digests for trace in parts):
            continue
        digests = [trace.digests[key] for trace in parts]
        moved = math.hypot(*(trace.deviations.get(key, 0.0) for trace in parts))
        if key.what in ("parameter", "buffer"):
            result.digests[key] = digest
            apart += (
                [] if all(digest.distance(each) == 0 for each in digests) else [f"{key.module}.{key.path}".lstrip(".")]
            )
            continue
        if any(each.shape != digest.shape for each in digests):
            shapes = ", ".join(str(each.shape) for each in digests)
            raise StateError(
                f"{what}: ranks have other shapes ({key.what} of {key.module or 'the model'}: {shapes}); compare rank by rank."
            )
        shares = key.what.endswith("gradient") or not digest.shape
        result.deviations[key] = moved / count if shares else moved
        result.digests[key] = (_mean if key.call < 0 or not digest.shape else _rows)(digests, shares)
        result.in_one_rank[key] = digest
    losses = [trace.facts.get("loss") for trace in parts]
    known = [loss for loss in losses if loss is not None]
    result.facts = {**first.facts, "loss": sum(known) / count if len(known) == count else None, "apart": apart}
    return result


def _mean(digests: Sequence[Digest], _shares: bool) -> Digest:
    """Of tensors of one shape at the same place; of a single number all is known."""
    first, figures = digests[0], torch.stack([each.figures for each in digests])
    if not first.shape:
        return Digest.of(figures[:, 3].mean().to(getattr(torch, first.dtype))).to_host()
    mean = figures.mean(0)
    mean[:3] = figures[:, :3].sum(0)
    mean[4] = mean[_MOMENTS:].square().sum()
    mean[5:_MOMENTS] = math.nan
    return first._replace(figures=mean, sample=torch.stack([each.sample for each in digests]).mean(0))


def _rows(digests: Sequence[Digest], shares: bool) -> Digest:
    """Of tensors whose rows follow each other, each times its share in the mean of the losses where that `shares`."""
    parts = [each.times(1 / len(digests)) if shares else each for each in digests]
    figures = torch.stack([each.figures for each in parts])
    whole = figures.sum(0)
    whole[6], whole[7] = figures[:, 6].min(), figures[:, 7].max()
    shape = (len(digests) * digests[0].shape[0], *digests[0].shape[1:])
    return digests[0]._replace(shape=shape, figures=whole, sample=torch.cat([each.sample for each in parts]))


def _joined_batch(parts: Sequence[Mapping[str, Tensor]], what: str) -> dict[str, Tensor]:
    """What `save_capture` keeps of a batch, of all ranks; random states are the first's."""
    batch = dict(parts[0])
    for name, x in parts[0].items():
        others = [part[name] for part in parts if name in part]
        if len(others) < len(parts) or any(each.shape[1:] != x.shape[1:] for each in others):
            raise StateError(f"{what}: the batches of ranks do not fit together ({name}); compare rank by rank.")
        if name.startswith("batch ") and x.dim():
            batch[name] = torch.cat(others)
        elif name.startswith("start "):
            batch[name] = torch.cat(others) / len(parts) if x.dim() else x
    return batch


def _forward_of(
    path: str, tensors: Mapping[str, Tensor], plain: Mapping[str, Any], model: nn.Module
) -> RecordedForward:
    if bad := [name for name, value in plain.items() if isinstance(value, str) and value.startswith("<")]:
        raise StateError(
            f"{path}: its batch holds {', '.join(bad)}, which a file without code cannot; compare it with another capture."
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def named(kind: str) -> dict[str, Tensor]:
        return {name.removeprefix(kind): x for name, x in tensors.items() if name.startswith(kind)}

    batch = {**plain, **{name: x.to(device) for name, x in named("batch ").items()}}
    arguments = tuple(batch.pop(name) for name in sorted((n for n in batch if n.isdecimal()), key=int))
    starts, states = {name: x.to(device) for name, x in named("start ").items()}, named("random ")
    others = {torch.device(at): x for at, x in states.items() if at != "cpu" and torch.device(at).type == device.type}
    state = RandomState(states["cpu"], others, None, None) if "cpu" in states else None
    return RecordedForward(model, arguments, batch, state, None, starts)
