"""Replays of a sharded model (FSDP2, tensor parallel), whose forward and backward passes are collectives: in lockstep, or not at all.

Every rank diagnoses by itself. When one wants a pass, all make it. Before each collective in it all ranks say that they are about to
make it: where one has raised, or goes another way, all stop, with the reason. Costs small all-gathers, after a skipped step only.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_amp.errors import in_one_line
from hf_amp.fallback.module_precision import holds_shards, is_unit
from hf_amp.fallback.operators import is_reentrant
from hf_amp.fallback.recorder import OBJECTS_DEEP, RecordedForward
from hf_amp.patch_log import removal
from hf_amp.precision import HALF_DTYPES
from hf_amp.statistics import extremes, is_distributed, is_sharded, local_part, to_host_list
from hf_amp.tree import tensors_in

_DONE, _ASKS, _COLLECTIVE, _ENDS, _FAILED, MODULES, OPERATORS, BACKWARD = range(8)
"""What a rank is about to do; the last three are passes."""


class RanksParted(RuntimeError):
    """A pass has ended on all ranks, because one could not go on with it."""


class Pass(NamedTuple):
    """A pass that all ranks make."""

    kind: int
    number: int
    """Of the forward pass, among those of the step."""
    variant: int
    """Whether gradients are on; of a backward pass, whether all is in FP32."""


class Lockstep:
    """What ranks that diagnose one skipped step say to each other. All of them make one for the same step.

    Args:
        device: where small tensors are exchanged.
        forwards: the forward passes that can be repeated.
        take_part: makes a pass that another rank wants; what it finds is dropped.
    """

    _of_thread: ClassVar[threading.local] = threading.local()

    def __init__(
        self,
        device: torch.device,
        forwards: Sequence[RecordedForward],
        take_part: Callable[[Pass, RecordedForward], Any],
    ) -> None:
        self._device, self._forwards, self._take_part = device, forwards, take_part
        self._serves = False
        self.is_talking = False

    @classmethod
    def now(cls) -> Lockstep | None:
        """The one that this thread is in."""
        return cls._of_thread.__dict__.get("now")

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Inside of it this rank diagnoses; left when all ranks are through, also by an exception."""
        self._of_thread.now = self
        try:
            yield
        finally:
            try:
                while (chosen := self._next(Pass(_DONE, 0, 0))).kind != _DONE:
                    self._serve(chosen)
            finally:
                self._of_thread.now = None

    def turn(self, kind: int, forward: RecordedForward, variant: bool) -> None:
        """Waits until all ranks make this pass of `forward`, and takes part in what others want before."""
        if self._serves:
            return
        indices = (i for i, own in enumerate(self._forwards) if own.options is forward.options)
        wanted = Pass(kind, next(indices, 0), int(variant))
        while (chosen := self._next(wanted)) != wanted:
            self._serve(chosen)

    def anyone(self, here: bool) -> bool:
        """Whether that is so on any rank, all of which ask.

        Raises:
            RanksParted: they do not.
        """
        return any(self._meet(_ASKS, int(here)))

    @contextmanager
    def guarding(self, model: nn.Module) -> Iterator[None]:
        """One pass of `model`: it ends on all ranks or on none.

        Raises:
            RanksParted: another rank has failed, or gone another way.
        """
        try:
            with _Guard(self):
                yield
            self._meet(_ENDS)
        except RanksParted:
            raise
        except BaseException as error:
            with suppress(RanksParted):
                self._meet(_FAILED, reason=in_one_line(error))
            raise
        finally:
            _reshard(model)

    def before(self, collective: Any, args: Any) -> None:
        """Before a collective of the model: whether all ranks are about to make the same.

        Raises:
            RanksParted: they are not.
        """
        shapes = [(tuple(x.shape), x.dtype) for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, Tensor)]
        self._meet(_COLLECTIVE, zlib.crc32(f"{collective} {shapes}".encode()))

    def _meet(self, kind: int, value: int = 0, reason: str = "") -> list[int]:
        """What all ranks bring to a place in a pass that all have come to."""
        rows = self._exchange(kind, value)
        kinds = [row[0] for row in rows]
        if _FAILED in kinds:
            reasons: list[Any] = [reason] * len(rows)
            if is_distributed():
                with self._talking():
                    dist.all_gather_object(reasons, reason)
            rank = kinds.index(_FAILED)
            raise RanksParted(f"rank {rank} could not repeat it: {reasons[rank]}")
        if len(set(kinds)) > 1 or (kind == _COLLECTIVE and len({row[1] for row in rows}) > 1):
            raise RanksParted("ranks go different ways through the model")
        return [row[1] for row in rows]

    def _next(self, wanted: Pass) -> Pass:
        """The pass that all ranks make next: what the first of them wants that wants one."""
        while True:
            rows = [Pass(*row) for row in self._exchange(*wanted)]
            if chosen := next((row for row in rows if row.kind >= MODULES), None):
                return chosen
            if all(row.kind == _DONE for row in rows):
                return rows[0]

    def _serve(self, chosen: Pass) -> None:
        self._serves = True
        try:
            with suppress(Exception):
                if self._forwards:
                    self._take_part(chosen, self._forwards[min(chosen.number, len(self._forwards) - 1)])
                else:
                    self._meet(_FAILED, reason="it has kept no forward pass")
        finally:
            self._serves = False

    def _exchange(self, *row: int) -> list[list[int]]:
        mine = (*row, 0, 0, 0)[:3]
        if not is_distributed():
            return [list(mine)]
        with self._talking(), torch.no_grad():
            told = torch.tensor(mine, dtype=torch.int64, device=self._device)
            rows = [torch.empty_like(told) for _ in range(dist.get_world_size())]
            dist.all_gather(rows, told)
            flat = [int(value) for value in to_host_list(rows)]
        return [flat[at : at + len(mine)] for at in range(0, len(flat), len(mine))]

    @contextmanager
    def _talking(self) -> Iterator[None]:
        self.is_talking = True
        try:
            yield
        finally:
            self.is_talking = False


def wait_for_turn(kind: int, forward: RecordedForward, variant: bool) -> None:
    """Before a pass; at once where it is nobody else's business."""
    if (lockstep := Lockstep.now()) is not None and holds_shards(forward.model):
        lockstep.turn(kind, forward, variant)


class _Guard(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Has all ranks meet before whatever collective the model makes: FSDP's, a tensor-parallel layer's, a gathered loss's."""

    supports_higher_order_operators = True

    def __init__(self, lockstep: Lockstep) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._lockstep = lockstep

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "to_local") for kind in types):
            return NotImplemented  # DTensor first: what it makes of the operator comes here again
        is_collective = "c10d" in getattr(func, "namespace", "") and "wait" not in func.__name__
        if is_collective and not self._lockstep.is_talking:
            self._lockstep.before(func, args)
        return func(*args, **(kwargs or {}))


def leave_casts_to_autocast(model: nn.Module) -> tuple[Callable[[], None], str]:
    """Has FSDP2 cast neither inputs nor outputs of its units to half precision, which no module in FP32 would cure; from now on.

    Returns what undoes it, and what was done, in words. Sets a private attribute; tests/contract fails by name if it goes.
    """
    former = []
    for unit in filter(is_unit, model.modules()):
        state = cast(Any, unit)._get_fsdp_state()
        policy = state._mp_policy
        inputs = policy.cast_forward_inputs and policy.param_dtype in HALF_DTYPES
        if inputs or policy.output_dtype in HALF_DTYPES:
            former.append((state, policy))
            state._mp_policy = dataclasses.replace(policy, cast_forward_inputs=False, output_dtype=None)

    def undo() -> None:
        for state, policy in former:
            state._mp_policy = policy

    return undo, f"{former[0][1]} of FSDP: {_LEFT_OUT}" if former else ""


_LEFT_OUT = (
    "what enters and leaves its units is no longer cast, so that modules can run in FP32; autocast casts inside of them. "
    "automatic_fallback=False leaves that as it was."
)


def beyond_gathered_format(model: nn.Module) -> list[str]:
    """Names of the parameters that are finite, and not in the half precision that FSDP2 gathers them in. One GPU-CPU sync."""
    found = []
    for prefix, unit in model.named_modules():
        dtype = cast(Any, unit)._get_fsdp_state()._mp_policy.param_dtype if is_unit(unit) else None
        if dtype in HALF_DTYPES:
            found += [
                (name, local_part(p.detach()), torch.finfo(dtype).max) for name, p in unit.named_parameters(prefix)
            ]
    ends = to_host_list(extremes(x).abs().amax() for _, x, _ in found)
    return list(dict.fromkeys(n for (n, _, most), end in zip(found, ends, strict=True) if most < end < math.inf))


def needs_others(module: nn.Module) -> bool:
    """Whether `module` cannot be called once more without a collective: parameters in it are shards as they are now."""
    return any(map(is_sharded, module.parameters()))


def _reshard(model: nn.Module) -> None:
    """What a pass has left gathered, and FSDP's notes of it: `zero_grad` and the next backward would follow them."""
    inside: set[nn.Module] = set()
    for module in model.modules():
        if is_unit(module) and module not in inside:
            cast(Any, module).reset_iter_state()
            inside.update(module.modules())


def without_wrapper(model: nn.Module) -> Callable[..., Any]:
    """What to call in `model`'s place: its own `forward` may be a wrapper that enters autocast again, as accelerate's does."""
    if not holds_shards(model):
        return functools.partial(type(model).forward, model)

    def call(*args: Any, **kwargs: Any) -> Any:
        own = vars(model).pop("forward", None)
        try:
            return model(*args, **kwargs)  # with the hooks that gather its parameters
        finally:
            if own is not None:
                vars(model)["forward"] = own

    return call


@contextmanager
def silent_while_gathering(model: nn.Module, silence: Callable[[bool], None]) -> Iterator[None]:
    """`silence(True)` before FSDP's own hooks, `silence(False)` after them: what they compute is not the model's."""

    def hook(on: bool, *_: Any) -> None:
        silence(on)

    begin, end, handles = functools.partial(hook, True), functools.partial(hook, False), []
    for unit in filter(is_unit, model.modules()):
        handles += [unit.register_forward_pre_hook(begin, prepend=True), unit.register_forward_pre_hook(end)]
        handles += [unit.register_forward_hook(begin, prepend=True), unit.register_forward_hook(end)]
    try:
        yield
    finally:
        removal(handles)()


class GatheredGradients:
    """A backward pass that looks at each gradient of a gathered parameter, this rank's own, as it comes, and lets go of it.

    Nothing is reduced or kept; `.grad` of the shards stays what it is.
    """

    def __init__(self) -> None:
        self.ends: list[tuple[str, Tensor]] = []
        """(name of the parameter, its gradient's least and largest element, shape [2])."""
        self._leaves: dict[int, Tensor] = {}
        self._handles: list[Any] = []

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Forward and backward pass go in here."""
        self._note("", model)
        for prefix, unit in model.named_modules():
            if is_unit(unit):  # whose parameters are gathered by then
                self._handles.append(unit.register_forward_pre_hook(functools.partial(self._note, prefix)))
        try:
            yield
        finally:
            removal(self._handles)()

    def _note(self, prefix: str, unit: nn.Module, *_: Any) -> None:
        for name, p in unit.named_parameters(prefix):
            if p.requires_grad and id(p) not in self._leaves:
                self._leaves[id(p)] = p
                hook = functools.partial(self._look, name)
                self._handles.append(cast(Any, p).register_post_accumulate_grad_hook(hook))

    def _look(self, name: str, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            gradient = local_part(gradient.detach())
            self.ends.append((name, extremes(gradient.coalesce().values() if gradient.is_sparse else gradient)))

    def backward(self, starts: Sequence[tuple[Tensor, Tensor]], output: Any) -> list[tuple[str, Tensor]] | None:
        """From (output, its gradient), to `ends`; where nothing is known to start from, None, and the part that others wait for."""
        found = [x for _, x in tensors_in(output, depth=OBJECTS_DEEP) if x.requires_grad]
        outputs, seeds = zip(*(starts or [(x, torch.zeros_like(x)) for x in found]), strict=True)
        kept = [(p, p.grad) for p in self._leaves.values()]
        try:
            for p, _ in kept:
                p.grad = None
            torch.autograd.backward(outputs, seeds, inputs=None if is_reentrant(outputs) else [p for p, _ in kept])
        finally:
            for p, gradient in kept:
                p.grad = gradient
        return self.ends if starts else None
