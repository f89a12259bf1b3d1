"""Why a gradient is not finite at any loss scale, tried on one block of a model in place of the whole: a fraction of the time.

Without it the whole model is run again, forward and backward, in FP32 and at one scale after the other, which says the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from hf_amp.device import RandomState, devices_of, runs_backward
from hf_amp.emulation import in_backward
from hf_amp.fallback.module_precision import CurrentPrecision, ForwardContext, holds_shards
from hf_amp.fallback.one_module import Given
from hf_amp.fallback.operators import OperatorTrace
from hf_amp.fallback.recorder import RecordedForward
from hf_amp.fallback.replay import (
    BackwardFindings,
    Found,
    float_tensors,
    gradient_ends,
    hooks_silent,
    nothing_changes,
    repeat_forward,
    replay_backward,
)
from hf_amp.patch_log import removal, takes_hooks
from hf_amp.precision import FP16_FORMAT, PrecisionMode
from hf_amp.statistics import extremes, to_host_list
from hf_amp.tree import copy_containers, map_tensors, tensors_of

POWERS = range(1, 25)
"""Scales of 2^-n that are tried, down to FP16's smallest value."""


class _Call(NamedTuple):
    """What a block was called with, the version of each tensor in it, and the random numbers that it drew from.

    Until it returns there are copies of the tensors as well; then what it has written into.
    """

    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    versions: list[int]
    random_state: RandomState
    given: Given | None
    written: Sequence[Tensor] = ()


class BlockFindings(NamedTuple):
    """What a block did in backward, from what came to its outputs from the loss without a scale.

    Attributes:
        in_fp32: what it does in FP32.
        in_format: what it does in the run's format, where that is not finite and in FP32 is, and no smaller scale serves: its gradients
            overflow, or one that counts in FP32 is lost to zero. None otherwise, and where that is not known.
    """

    in_fp32: BackwardFindings
    in_format: BackwardFindings | None = None


class BlockGradients:
    """Context that notes what blocks are called with, and what comes to their outputs, while a backward is repeated.

    Blocks are the members of lists of modules, and the modules outside of them that hold no list. Of sharded models nothing
    is noted. Keeps a gradient of each block's output, and what it was called with.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._calls: dict[str, _Call] = {}
        self._came_to: dict[str, dict[str, Tensor]] = {}
        self._outputs: list[Tensor] = []

    def __enter__(self) -> BlockGradients:
        handles = []
        if not holds_shards(self._model):
            handles = [m.register_forward_hook(self._note_ends) for m in self._model.modules() if takes_hooks(m)]
            for name, block in _blocks(self._model):
                note_call, note = (functools.partial(each, name) for each in (self._note_call, self._note_gradients))
                handles.append(block.register_forward_pre_hook(note_call, prepend=True, with_kwargs=True))
                handles.append(block.register_forward_hook(note))
        self._remove = removal(handles)
        return self

    def __exit__(self, *raised: object) -> None:
        self._remove()

    def outputs_are_finite(self) -> bool:
        """Whether all that modules returned is, as far as it was noted. One GPU-CPU sync."""
        return bool(self._outputs) and all(map(math.isfinite, to_host_list(self._outputs)))

    def _note_ends(self, _module: nn.Module, _arguments: Any, output: Any) -> None:
        self._outputs += [extremes(x.detach()) for _, x in float_tensors(output)]

    def _note_call(self, name: str, _block: nn.Module, arguments: Any, options: Any) -> None:
        if not runs_backward():  # which calls it again where it is checkpointed
            inputs = copy_containers((arguments, options))
            versions = [x._version for x in tensors_of(inputs) if not x.is_inference()]
            random_state = RandomState.now(devices_of(self._model))
            self._calls[name] = _Call(inputs, versions, random_state, Given(arguments, options))

    def _note_gradients(self, name: str, _block: nn.Module, _arguments: Any, output: Any) -> None:
        if runs_backward():
            return
        if (given := self._calls[name].given) is not None:
            self._calls[name] = self._calls[name]._replace(given=None, written=given.changes())
        ran_before = name in self._came_to  # then what comes to its outputs is not one gradient
        gradients = self._came_to[name] = {"": torch.tensor(math.nan)} if ran_before else {}
        for path, x in float_tensors(output):
            if x.requires_grad and not ran_before:
                cast(Any, x).register_hook(functools.partial(_keep, gradients, path))

    def replay(
        self, forward: RecordedForward, current: CurrentPrecision, bad: BackwardFindings
    ) -> BlockFindings | None:
        """What the block that makes the first bad gradient does in FP32, and where that is finite in the run's format.

        In FP32 it is given what the model in FP32 gives it, in the run's format what it was given, in backward what came to it. None
        where that is not finite, or not known. Costs at most a forward pass of the model, and a few backward passes of one block.
        """
        name = self._to_try(bad)
        if name is None:
            return None
        in_fp32 = self._in_fp32(name, forward, current, bad)
        if in_fp32 is None or in_fp32.parameters:
            return None if in_fp32 is None else BlockFindings(in_fp32)
        call, found = self._calls[name], BlockFindings(in_fp32)
        versions = [x._version for x in tensors_of(call.inputs) if not x.is_inference()]
        if call.versions != versions or any(to_host_list(call.written)):
            return found
        block = forward.model.get_submodule(name)
        silent = hooks_silent(list(block.parameters()))
        with suppress(Exception), nothing_changes(forward.model, gradients=True), silent:
            call.random_state.restore()
            repeated = _BlockBackward(name, block, self._came_to[name], current, bad)
            with repeated.trace.watching(block, name):
                with current() as precision:
                    starts = repeated.run(*_cut(call.inputs, call.inputs))
                with in_backward(precision):
                    in_format = repeated.backward(starts, 1.0, by_operator=True)
                    if in_format.parameters:
                        # At the first of these powers half precision just holds what comes to the outputs.
                        largest = max(map(abs, to_host_list(extremes(g) for _, g in starts)))
                        serves = power_that_serves(
                            lambda power: repeated.backward(starts, 2.0**-power),
                            in_fp32,
                            begin=POWERS[-1] + math.ceil(math.log2(largest)),
                            least=False,
                        )
                        found = BlockFindings(in_fp32, None if serves else in_format)
        return found

    def _to_try(self, bad: BackwardFindings) -> str | None:
        """The block that holds the first bad parameter, or else the earliest that backward came to with finite gradients."""
        names = [name for name, came in self._came_to.items() if came]
        of_block = [name for name in names for _ in self._came_to[name]]
        ends = to_host_list(extremes(x) for name in names for x in self._came_to[name].values())
        bad_ends = {of_block[i // 2] for i, end in enumerate(ends) if not math.isfinite(end)}
        finite = [name for name in names if name not in bad_ends]
        around = [name for name in finite if bad.parameters and bad.parameters[0].startswith(f"{name}.")]
        return max(around, key=len) if around else next(iter(finite), None)

    def _in_fp32(
        self, name: str, forward: RecordedForward, current: CurrentPrecision, bad: BackwardFindings
    ) -> BackwardFindings | None:
        block, found = forward.model.get_submodule(name), list[BackwardFindings]()
        repeated = _BlockBackward(name, block, self._came_to[name], current, bad)

        def look(_block: nn.Module, arguments: Any, options: Any) -> None:
            handle.remove()
            with torch.enable_grad(), repeated.trace.watching(block, name):
                starts = repeated.run(*_cut((arguments, options), self._calls[name].inputs))
                found.append(repeated.backward(starts, 1.0, by_operator=True))
            raise Found

        handle = block.register_forward_pre_hook(look, prepend=True, with_kwargs=True)
        in_fp32, silent = current.entry.context(PrecisionMode.FP32), hooks_silent(list(block.parameters()))
        with suppress(Exception), nothing_changes(forward.model), silent, ForwardContext.suspended(), in_fp32:
            repeat_forward(forward, in_fp32=True)
        handle.remove()
        return found[0] if found else None


class _BlockBackward:
    """One forward pass of a block, and the backward passes behind it."""

    def __init__(
        self, name: str, block: nn.Module, came_to: dict[str, Tensor], current: CurrentPrecision, bad: BackwardFindings
    ) -> None:
        self._name, self._block, self._came_to, self._bad = name, block, came_to, bad
        self.trace = OperatorTrace(current, forward=False)
        self._named: list[tuple[str, Tensor]] = []

    def run(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """(output, what comes to it), after a forward pass."""
        named = [(f"{self._name}.{path}", p) for path, p in self._block.named_parameters() if p.requires_grad]
        given = [("", x) for _, x in float_tensors((arguments, options)) if x.requires_grad]
        self._named = named + given
        outputs = dict(float_tensors(self._block(*arguments, **options)))
        return [(outputs[path], g) for path, g in self._came_to.items()]

    def backward(
        self, starts: list[tuple[Tensor, Tensor]], factor: float, by_operator: bool = False
    ) -> BackwardFindings:
        """What a backward pass from `factor` times what comes to the outputs does. Can be repeated."""
        scaled = [(x, (g.to(torch.float32) * factor).to(x)) for x, g in starts]
        if by_operator:
            self.trace.repeats_backward = True
            self.trace.watch_backward([x for x, _ in scaled])
        found = gradient_ends(scaled, self._named, first_only=by_operator, retain_graph=True)
        if found is None:
            raise RuntimeError("backward cannot be repeated")
        ends = to_host_list(end for _, pair in found for end in pair)
        pairs = list(zip((name for name, _ in found), zip(ends[::2], ends[1::2], strict=True), strict=True))
        wrong = [name for name, pair in pairs if not all(map(math.isfinite, pair))]
        wrong = [name for name in wrong if name] or self._bad.parameters[: len(wrong)]
        magnitudes = {name: max(map(abs, pair)) for name, pair in pairs if name}
        return BackwardFindings(wrong, magnitudes, self.trace.in_backward)


def lost_at(power: int, found: BackwardFindings, in_fp32: BackwardFindings) -> set[str]:
    """Names of those whose gradient is zero in `found`, at a scale of 2^-n, and `in_fp32`, without one, a number that FP16 holds there.

    A normal one: what is smaller, as the rounding noise of a derivative that is zero (the weights of a single expert), may be lost.
    """
    least = FP16_FORMAT.smallest_normal * 2.0**power
    return {name for name, magnitude in in_fp32.magnitudes.items() if magnitude >= least} - found.moved


def power_that_serves(
    backward: Callable[[int], BackwardFindings | None],
    in_fp32: BackwardFindings,
    begin: int,
    least: bool = True,
    powers: range = POWERS,
) -> int | None:
    """The least n for which gradients at a scale of 2^-n are finite and none is lost (see `lost_at`); None where there is none.

    `backward` tries one of `powers`, from `begin` on in growing steps; the first that serves is enough unless the `least` is wanted.
    """
    low, high, width, serves = powers[0], powers[-1], 1, None
    power = min(max(low, begin), high)
    while low <= high and (least or serves is None):
        found = backward(power)
        overflows = found is None or bool(found.parameters)
        lost = found is not None and bool(lost_at(power, found, in_fp32))
        if overflows and lost:
            return None  # a larger scale overflows too, and a smaller one loses them too
        serves = serves if overflows or lost else power
        low, high = (power + 1, high) if overflows else (low, power - 1)
        power, width = power + (width if overflows else -width), 2 * width
        power = power if low <= power <= high else (low + high) // 2
    return serves


def lost_at_any_scale(
    forward: RecordedForward, current: CurrentPrecision, scale: float, at_one: BackwardFindings
) -> BackwardFindings | None:
    """What backward does at the least of the scales up to `scale` at which it overflows, where each one below that loses a gradient.

    That is a gradient that is zero throughout, and in FP32 above 1 without a scale: what it is made from was lost on the way to an
    operator that multiplies it by more than FP16 spans. None where a scale between serves, and where that is not known.
    Costs nothing where no gradient is zero, else a step in FP32, and where one is lost some in the run's format.

    Args:
        at_one: what backward does without a scale, which is finite.
    """
    if scale <= 1 or at_one.is_probe or all(at_one.magnitudes.values()):
        return None
    in_fp32 = replay_backward(forward, current, 1.0, scale, in_fp32=True, first_only=True)
    if in_fp32 is None or in_fp32.parameters:
        return None
    large = {name: x for name, x in in_fp32.magnitudes.items() if x > 1 and not at_one.magnitudes.get(name)}
    overflowing = [scale]

    def tried(power: int) -> BackwardFindings | None:
        found = replay_backward(forward, current, 2.0**-power, scale)
        overflowing.extend([2.0**-power] if found and found.parameters else [])
        return found

    powers = range(1 - math.ceil(math.log2(scale)), 1)
    in_fp32 = in_fp32._replace(magnitudes=large)
    if not large or power_that_serves(tried, in_fp32, powers[0], least=False, powers=powers) is not None:
        return None
    found = replay_backward(forward, current, min(overflowing), scale, by_operator=True)
    return found if found and not large.keys().isdisjoint(found.parameters) else None


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the members of lists of modules, and of what is outside of them and holds no list."""
    lists = (nn.ModuleList, nn.Sequential)
    holders = {id(at) for at in model.modules() if any(isinstance(x, lists) for x in at.modules())}
    for prefix, at in model.named_modules():
        for name, child in at.named_children():
            is_outside = (at is model or id(at) in holders) and id(child) not in holders
            if takes_hooks(child) and (isinstance(at, lists) or is_outside):
                yield f"{prefix}.{name}".lstrip("."), child


def _keep(gradients: dict[str, Tensor], path: str, gradient: Tensor | None) -> None:
    if gradient is not None:  # as reentrant checkpointing has it of an output that nothing uses
        gradients[path] = gradient


def _cut(inputs: Any, like: Any) -> Any:
    """`inputs` without what made them; those get gradients that do in `like`, which holds as many."""
    wanted = iter([x.requires_grad for x in tensors_of(like)])
    return map_tensors(lambda x: x.detach().requires_grad_(next(wanted) and x.is_floating_point()), inputs)
