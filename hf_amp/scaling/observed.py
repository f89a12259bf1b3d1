"""`ObservedScaler`: the account of a loss scale that another library keeps, told as if it were ours."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_amp.config import MixedPrecisionConfig
from hf_amp.scaling.loss import SeenLosses
from hf_amp.scaling.outcome import StepOutcome
from hf_amp.scaling.scaler import AdvancedGradScaler
from hf_amp.statistics import agreement
from hf_amp.statistics.snapshot import PendingRead
from hf_amp.statistics.transfer import moved


class ObservedScaler(AdvancedGradScaler):
    """Counts and tells the steps of a scaler that is not ours, and neither scales nor skips anything.

    What is on the device (losses, the gradient norm) comes to the host without a wait: with the step itself where it
    has arrived by then, or where the step was skipped, else with the next step.
    """

    def __init__(self, config: MixedPrecisionConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self._newest: _ObservedStep | None = None
        self._next_scale = 1.0

    def note_loss(self, loss: Tensor) -> None:
        """Sees an unscaled loss on its way into backward. No host read."""
        self._losses.note(loss, loss.device)

    def note_step(
        self,
        optimizer: torch.optim.Optimizer,
        applied: bool,
        scale: float,
        next_scale: float,
        grad_norm: Tensor | float | None,
    ) -> None:
        """Takes a step that is over into account. Reads the host where it was skipped; all ranks must then call it.

        Args:
            scale: what the gradients' backward used.
            next_scale: what the next one will use.
            grad_norm: 2-norm of the unscaled gradients before clipping; a tensor has one element. None where unknown.
        """
        self.flush()
        self._next_scale = next_scale
        self.decided_steps += 1
        self._newest = self._observed(optimizer, applied, scale, grad_norm)
        self._losses = SeenLosses()
        if not applied or self._newest.figures.ready():
            self.flush()

    def _observed(
        self,
        optimizer: torch.optim.Optimizer,
        applied: bool,
        scale: float,
        grad_norm: Tensor | float | None,
    ) -> _ObservedStep:
        bad = self._losses.non_finite
        bad = torch.zeros((), device=self._device) if bad is None else bad
        if not applied and self.ranks_agree and agreement.is_needed():
            (bad,) = agreement.largest_over_ranks(bad)
        norm = torch.as_tensor(math.nan if grad_norm is None else grad_norm).detach().reshape(())
        figures = PendingRead({"bad": bad, "norm": moved(norm, bad.device)})
        return _ObservedStep(self.decided_steps, optimizer, applied, scale, self._losses.number, figures)

    def flush(self) -> None:
        """Waits for the figures of the newest step, and delivers it, unless that has been done."""
        if self._newest is not None:
            newest, self._newest = self._newest, None
            self._count(newest.outcome(), newest.optimizer)
        super().flush()

    def get_scale(self) -> float:
        """The scale that the next backward will use, as of the newest step. No host read."""
        return self._next_scale


@dataclass(frozen=True)
class _ObservedStep:
    """One step, with what is on its way to the host: "bad", how many losses were not finite, and "norm"."""

    attempt: int
    optimizer: torch.optim.Optimizer
    applied: bool
    scale: float
    losses: int
    figures: PendingRead

    def outcome(self) -> StepOutcome:
        host = self.figures.result()
        return StepOutcome(
            attempt=self.attempt,
            applied=self.applied,
            scale=self.scale,
            backward=self.attempt,
            loss_finite=host["bad"] == 0 if self.losses else None,
            losses=self.losses,
            non_finite_losses=int(host["bad"]),
            grad_norm=host["norm"] if self.applied and math.isfinite(host["norm"]) else None,
        )
