"""From figures on the device to a `StepOutcome` on the host: now, or one step late without waiting."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from hf_amp.scaling.boundary import CARRIED, Boundary
from hf_amp.scaling.outcome import StepOutcome
from hf_amp.statistics import snapshot
from hf_amp.statistics.gradients import count_non_finite


def outcome_now(attempt: int, boundary: Boundary) -> StepOutcome:
    """What is to become of the step. One host read; more where it overflowed, to look closer."""
    host = snapshot.read(boundary.figures())
    if host["found_inf"] and boundary.inferred:
        boundary.verify()
        host = snapshot.read(boundary.figures())
    if host["found_inf"]:
        return _outcome(attempt, boundary, host, count_non_finite(boundary.gradients))
    if not math.isfinite(host.get("norm", 0.0)):
        boundary.mend_norm()
        host = snapshot.read(boundary.figures())
    outcome = _outcome(attempt, boundary, host, None)
    boundary.known_clean = boundary.has_gradients and not outcome.zero_gradients
    return outcome


class PendingVerdict:
    """The outcome of a step whose optimizer decides on the device, on its way to the host."""

    def __init__(self, attempt: int, boundary: Boundary, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._attempt = attempt
        self._boundary = boundary
        self._read = snapshot.PendingRead(boundary.figures())

    def age(self, attempts: int) -> int:
        """Steps decided since."""
        return attempts - self._attempt

    def ready(self) -> bool:
        """Whether `outcome` would not wait for the device."""
        return self._read.ready()

    def outcome(self) -> StepOutcome:
        """The outcome; waits for the device where `ready` is False. What was not finite has not been counted."""
        return _outcome(self._attempt, self._boundary, self._read.result(), None)


def _outcome(
    attempt: int, boundary: Boundary, host: Mapping[str, float], non_finite: tuple[int, int] | None
) -> StepOutcome:
    applied = host["found_inf"] == 0
    magnitude = min(host[name] for name in ("norm", "amax", "magnitude") if name in host)

    def finite(name: str) -> float | None:
        value = host.get(name, math.nan)
        return value if math.isfinite(value) else None

    return StepOutcome(
        attempt=attempt,
        applied=applied,
        scale=host["scale"],
        backward=boundary.backward,
        loss_finite=host["loss_non_finite"] == 0 if "loss_non_finite" in host else None,
        losses=boundary.losses,
        non_finite_losses=min(int(host.get("loss_non_finite", 0)), boundary.losses),
        zero_gradients=magnitude == 0 and boundary.has_gradients,
        has_gradients=boundary.has_gradients,
        grad_norm=finite("norm") if applied else None,
        grad_amax=finite("amax") if applied else None,
        underflow_fraction=finite("underflow_fraction"),
        lost_update_fraction=finite("lost_update_fraction"),
        inf_elements=non_finite[0] if non_finite else None,
        nan_elements=non_finite[1] if non_finite else None,
        carried={
            name.removeprefix(CARRIED): value for name, value in host.items() if name.startswith(CARRIED)
        },
    )
