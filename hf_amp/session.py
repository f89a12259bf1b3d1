"""`AmpSession`: scaling, fallback and monitoring of one run, wired together."""

from __future__ import annotations

import uuid
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from hf_amp.config import MixedPrecisionConfig, PrecisionMode
from hf_amp.events import AmpEvent, Cause, EventKind
from hf_amp.fallback.cause import diagnose
from hf_amp.fallback.plan import PrecisionPlan
from hf_amp.hardware import Hardware
from hf_amp.monitoring.monitor import PrecisionMonitor
from hf_amp.monitoring.sinks import console
from hf_amp.reversible import ReversibleChanges
from hf_amp.scaling.outcome import StepOutcome
from hf_amp.scaling.scaler import AdvancedGradScaler

EVENTS_KEPT = 10_000
"""Newest events that a session keeps; the JSON-lines log has all."""


class AmpSession:
    """What hf_amp does and knows in one run. Made by `attach` and `MixedPrecisionCallback`.

    Attributes:
        config: the options in force.
        scaler: the gradient scaler; in FP32 and BF16 it scales nothing and only guards.
        plan: which precision runs where.
        hardware: what the device can run.
        first_step: what the scaler's first decided step is called in events; 1, or later in a resumed run.
        folds_clipping: whether clipping by norm may fold into the optimizer step: nobody looks at gradients before it.
        run_id: names the run in logs.
        sinks: called with every event.
        changes: what was changed on the instances attached to; undone by `detach`.
    """

    def __init__(
        self,
        config: MixedPrecisionConfig,
        scaler: AdvancedGradScaler,
        mode: PrecisionMode,
        hardware: Hardware,
    ) -> None:
        self.config = config
        self.scaler = scaler
        self.plan = PrecisionPlan(default=mode)
        self.hardware = hardware
        self.first_step = 1
        self.folds_clipping = False
        self.run_id = uuid.uuid4().hex[:12]
        self.sinks: list[Callable[[AmpEvent], None]] = [console.write]
        self.changes = ReversibleChanges()
        self._models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._monitor = PrecisionMonitor()
        self._events: deque[AmpEvent] = deque(maxlen=EVENTS_KEPT)
        self._at_floor = False
        self._newest_step = 0
        scaler.observers.append(self._record_step)
        scaler.companions["monitor"] = self._monitor

    # ---- what people read -----------------------------------------------------------------------------------

    @property
    def events(self) -> Sequence[AmpEvent]:
        """What happened, oldest first; at most the newest 10,000."""
        return tuple(self._events)

    def metrics(self) -> dict[str, float]:
        """The catalogue's names and their newest values; see `monitoring/metrics.py`. No host read."""
        return self._monitor.metrics()

    def what_runs(self) -> str:
        """One phrase: the precision of the run, and what that means on this device."""
        if self.plan.default in (PrecisionMode.MIXED, PrecisionMode.FP16):
            return self.hardware.describe_fp16(self.config.emulate)
        return f"{self.plan.default.value} on {self.hardware.name}"

    # ---- what integrations call -----------------------------------------------------------------------------

    def adopt(self, model: nn.Module) -> None:
        """Remembers `model`, for the names of its parameters, without keeping it alive."""
        self._models.add(model)

    def record(self, event: AmpEvent) -> None:
        """Gives one event to the session's list and to every sink."""
        self._events.append(event)
        for sink in self.sinks:
            sink(event)

    def note(self, kind: EventKind, message: str, **figures: Any) -> None:
        """Records an event in which nothing went wrong."""
        self.record(AmpEvent(self._newest_step, kind, message=message, figures=figures))

    def begin_at(self, completed_steps: int) -> None:
        """Makes step numbers in events go on from `completed_steps`, which a resumed run has behind it."""
        self.first_step = completed_steps + 1 - self.scaler.decided_steps
        self._newest_step = completed_steps

    def detach(self) -> None:
        """Gives everything that was attached to its former state. Harmless when called again."""
        if self._record_step in self.scaler.observers:
            self.scaler.observers.remove(self._record_step)
            self.changes.undo()
            self.note(EventKind.DETACHED, "hf_amp is detached; what it had changed is as before.")

    def __enter__(self) -> AmpSession:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.detach()

    # ---- one optimizer step ---------------------------------------------------------------------------------

    def _record_step(self, outcome: StepOutcome, optimizer: torch.optim.Optimizer) -> None:
        step = self.first_step + outcome.attempt - 1
        self._newest_step = step
        if outcome.applied:
            self._monitor.record_applied(
                outcome.scale, outcome.grad_norm, outcome.grad_amax, outcome.underflow_fraction
            )
            self._at_floor = False
            return
        next_scale = self.scaler.get_scale()
        diagnosis = diagnose(outcome.loss_finite, self._named_parameters(optimizer))
        self._monitor.record_skipped(diagnosis.cause, next_scale, outcome.inf_elements, outcome.nan_elements)
        self.record(
            AmpEvent(
                step=step,
                kind=EventKind.STEP_SKIPPED,
                cause=diagnosis.cause,
                before=outcome.scale,
                after=next_scale,
                message=diagnosis.message,
                figures={
                    "inf_elements": outcome.inf_elements,
                    "nan_elements": outcome.nan_elements,
                },
            )
        )
        if outcome.loss_finite and outcome.scale <= self.config.min_scale and not self._at_floor:
            self._at_floor = True
            self.record(
                AmpEvent(
                    step=step,
                    kind=EventKind.SCALE_AT_FLOOR,
                    cause=Cause.UNKNOWN,
                    before=outcome.scale,
                    after=next_scale,
                    message="the gradients overflow even at the smallest scale, so the scale is not the cause; "
                    "train in BF16 or FP32 and look for activations beyond 65504.",
                )
            )

    def _named_parameters(self, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
        names = {p: name for model in self._models for name, p in model.named_parameters()}
        held = [p for group in optimizer.param_groups for p in group["params"]]
        return [(names.get(p, f"parameter {index}"), p) for index, p in enumerate(held)]
