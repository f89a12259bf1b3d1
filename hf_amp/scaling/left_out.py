"""A rank that leaves its step out after backward (its own loss is too large, an exception is caught): all ranks skip that step.

The others wait for its verdict at the end of the step, and it would go into the next forward pass. There it notices that gradients
were made and cleared without a step, and says so first. Nothing is exchanged otherwise. A loss that does not go into backward is
nothing that it could make up for, as the others wait in DistributedDataParallel's or FSDP's own backward: see `desync.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_amp.errors import in_one_line
from hf_amp.events import EventKind
from hf_amp.patch_log import UnpickledHook, takes_hooks
from hf_amp.scaling.desync import DesyncMonitor
from hf_amp.scaling.step import StepState, Unscale
from hf_amp.statistics import held_by, is_distributed, is_sharded

if TYPE_CHECKING:
    from hf_amp.scaling.scaler import AdvancedGradScaler

LEFT_OUT = (
    "rank {} has left this step out after its backward, and the others have not: all skip it, so that they stay alike. Leave a step "
    "out on all ranks or on none: decide by what all of them know, as by the gradient norm that clipping returns, or a loss that was "
    "gathered."
)


def ended_in_words(error: BaseException, step: int, without_backward: int) -> str:
    """What a rank says of itself when an exception that nobody catches ends it: the others tell of a lost connection, or a timeout.

    Args:
        step: in which it ends.
        without_backward: the newest step in which a forward pass of it had no backward; 0 for none.
    """
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    hint = (
        f" In step {without_backward} a forward pass of this rank was followed by another without a backward in between: where the other "
        "ranks have made that backward, they wait in vain. Leave a step out on all ranks or on none."
    )
    return f"rank {rank} of {ranks} ends in step {step}: {in_one_line(error)}.{hint if without_backward else ''}"


def join_left_out_steps(
    scaler: AdvancedGradScaler, called: nn.Module, note: Callable[[EventKind, str], None]
) -> Callable[[], None]:
    """Has ranks that agree look for a step left out before each call of `called`; returns what undoes it. After all other hooks:
    this one comes first. `note` records an event."""
    if not (scaler.ranks_agree and takes_hooks(called)):
        return lambda: None
    is_collective = any(map(is_sharded, called.parameters()))
    if scaler.desync is None and is_distributed():
        with suppress(Exception):  # a store that a thread cannot share
            scaler.desync = DesyncMonitor(scaler, note)
    handle = called.register_forward_pre_hook(_JoinLeftOutStep(scaler, is_collective), prepend=True)

    def undo() -> None:
        handle.remove()
        monitor, scaler.desync = scaler.desync, None
        if monitor is not None:
            monitor.stop()

    return undo


class _JoinLeftOutStep(UnpickledHook):
    """A hook that runs before a model's forward pass, and before FSDP's own. One look at a flag where no step was left out.

    Not with several optimizers, nor master weights, nor where verdicts are late. Before a pass without gradients only where all ranks
    make it, because they gather parameters in it: else one rank may evaluate while the others wait for it.
    """

    def __init__(self, scaler: AdvancedGradScaler, is_collective: bool) -> None:
        self._scaler, self._is_collective = scaler, is_collective
        self._backwards = -1  # begun at the newest forward pass with gradients

    def __call__(self, module: nn.Module, arguments: Any) -> None:
        if torch.compiler.is_compiling():
            return
        losses = self._scaler._pending.losses
        if losses.began and not losses.ended and (self._is_collective or torch.is_grad_enabled()) and is_distributed():
            self._join()
        if torch.is_grad_enabled() and self._scaler.desync is not None and not self._scaler.is_replaying():
            before, self._backwards = self._backwards, self._scaler._pending.backwards
            self._scaler.desync.before_forward(module, before == self._backwards, self._is_collective)

    def _join(self) -> None:
        scaler = self._scaler
        pending, known = scaler._pending, list(scaler._pending._alive())
        if len(known) != 1 or known[0][0].record is not None or scaler.master_weights is not None:
            return
        (_, optimizer) = known[0]
        if scaler._defers(optimizer) or any(p.grad is not None for p in held_by(optimizer)):
            return
        held = [p for p in held_by(optimizer) if p.requires_grad]
        for p in held:  # so that this rank tells of as much as the others do
            p.grad = torch.zeros_like(p)
        try:
            takes_norm = scaler.newest_request is not None and scaler.newest_request.norm
            unscale = Unscale.NONE if scaler.no_scaling else Unscale.IN_PLACE
            record = scaler._check(optimizer, unscale, norm=takes_norm, left_out=True)
            outcome = record.to_host(scaler.decided_steps + 1)
        finally:
            for p in held:
                p.grad = None
        pending.losses.began = False
        if record.host["amax"] < 0:  # all ranks have left it out: nobody waits
            pending.forget(id(optimizer))
            return
        record.state = StepState.STEPPED
        pending.close(optimizer, record)
        scaler.decided_steps = outcome.attempt
        scaler._count(outcome, optimizer)
        scaler.update()
