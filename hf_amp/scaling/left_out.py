"""A rank that leaves its step out after backward (its own loss is too large, an exception is caught): all ranks skip that step.

The others wait for its verdict at the end of the step, and it would go into the next forward pass. There it notices that gradients
were made and cleared without a step, and says so first. Nothing is exchanged otherwise. A loss that does not go into backward is
nothing that it could make up for: the others wait in DistributedDataParallel's or FSDP's own backward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_amp.patch_log import UnpickledHook
from hf_amp.scaling.step import StepState, Unscale
from hf_amp.statistics import held_by, is_distributed

if TYPE_CHECKING:
    from hf_amp.scaling.scaler import AdvancedGradScaler

LEFT_OUT = (
    "rank {} has left this step out after its backward, and the others have not: all skip it, so that they stay alike. Leave a step "
    "out on all ranks or on none: decide by what all of them know, as by the gradient norm that clipping returns, or a loss that was "
    "gathered."
)


class JoinLeftOutStep(UnpickledHook):
    """A hook that runs before a model's forward pass, and before FSDP's own. One look at a flag where no step was left out.

    Not with several optimizers, nor master weights, nor where verdicts are late.
    """

    def __init__(self, scaler: AdvancedGradScaler) -> None:
        self._scaler = scaler

    def __call__(self, module: nn.Module, arguments: Any) -> None:
        pending = self._scaler._pending
        if pending.losses.began and not pending.losses.ended and not torch.compiler.is_compiling() and is_distributed():
            self._join()

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
