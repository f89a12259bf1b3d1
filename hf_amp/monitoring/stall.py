"""When a run can learn nothing any more, and why."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Annotated, Any

from hf_amp.config import Allowed
from hf_amp.events import AmpEvent, Cause, EventKind, StepOutcome
from hf_amp.serialization import parse, parse_fields

CauseName = Annotated[str, Allowed("one of " + ", ".join(Cause.__members__), lambda v: v in Cause.__members__)]


@dataclasses.dataclass
class StallDetector:
    """Counts steps in a row in which the model learned nothing. Reported once per row; a step in which it learns ends it.

    Args:
        patience: steps in a row after which the run is stalled. Non-finite weights or buffers stall it at once.
    """

    patience: int
    skipped_by_cause: Counter[CauseName] = dataclasses.field(default_factory=Counter)
    zero_steps: int = 0
    empty_steps: int = 0
    stalled: bool = False
    underflows: bool = False

    def after_skipped(self, cause: Cause, step: int) -> AmpEvent | None:
        """One skipped step; what it shows of the run, where that is new."""
        self.skipped_by_cause[cause.value] += 1
        if cause in (Cause.WEIGHTS, Cause.BUFFER):
            return self.mark_stalled(step, cause, "no step can correct weights or buffers that are not finite")
        if not self._patience_is_over():
            return None
        main = Cause[self.skipped_by_cause.most_common(1)[0][0]]
        return self.mark_stalled(
            step, main, f"all of the last {self.patience} steps were skipped, most for {main.value}"
        )

    def after_applied(
        self, outcome: StepOutcome, step: int, underflows: bool = False, why: str = ""
    ) -> AmpEvent | None:
        """One applied step; what it shows of the run, where that is new.

        One step without any gradient is nothing to report: it may be another optimizer's turn. `underflows`: its gradients, which
        are all 0, were seen not to be in FP32. `why`: what a replay has shown of a loss that is not finite.
        """
        if not outcome.has_gradients:
            self.empty_steps += 1
            reason = f"for {self.empty_steps} steps no parameter that the optimizer holds had a gradient"
            return self.mark_stalled(step, Cause.UNKNOWN, reason, _NO_GRADIENTS) if self._patience_is_over() else None
        if not outcome.zero_gradients:
            self.skipped_by_cause.clear()
            self.zero_steps, self.empty_steps, self.stalled = 0, 0, False
            return None
        self.underflows = underflows or (self.underflows and self.zero_steps > 0)
        self.zero_steps += 1
        flushed = self.underflows or (outcome.loss_finite is not False and outcome.scale < 1)
        cause = Cause.SCALE if flushed else Cause.LOSS
        seen = (why.rstrip(".") or _LOSS_IS_NAN) if outcome.loss_finite is False else _ALL_ZERO
        if flushed:
            seen = f"the scale of {outcome.scale:g} leaves nothing of them in FP16"
        remedy = (_DECAYED if outcome.scale < 1 else _UNDERFLOW) if flushed else None
        if self._patience_is_over():
            reason = f"for {self.zero_steps} steps every gradient was exactly zero" + f": {seen}" * flushed
            return self.mark_stalled(step, cause, reason, remedy)
        if self.zero_steps > 1:
            return None
        message = f"every gradient is exactly zero, and nothing was learned from this step: {seen}."
        return AmpEvent(step, EventKind.ZERO_GRADIENTS, cause, message=" ".join(filter(None, (message, remedy))))

    def _patience_is_over(self) -> bool:
        return sum(self.skipped_by_cause.values()) + self.zero_steps + self.empty_steps >= self.patience

    def mark_stalled(self, step: int, cause: Cause, reason: str, remedy: str | None = None) -> AmpEvent | None:
        """The run is stalled for `reason`; None where that was reported. `remedy`: where it is not that of `cause`."""
        if self.stalled:
            return None
        self.stalled = True
        remedy = remedy or cause.facts.remedy
        return AmpEvent(step, EventKind.STALLED, cause, message=f"this run learns nothing: {reason}. {remedy}")

    def state_dict(self) -> dict[str, Any]:
        """What was counted, as numbers and one flat mapping."""
        state = {**dataclasses.asdict(self), "skipped_by_cause": dict(self.skipped_by_cause)}
        del state["patience"]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from `state_dict`; patience stays as configured.

        Raises:
            StateError: it is no such state; nothing has changed then.
        """
        saved = {**parse(dict[str, Any], state_dict, "stall"), "patience": self.patience}
        vars(self).update(parse_fields(StallDetector, saved, "stall"))


_UNDERFLOW = "Raise init_scale, or take scaling_strategy ADAPTIVE, which does so by itself; or make the loss larger, or train in BF16."
_ALL_ZERO = (
    "where the loss is 0.0 too, every label of the batch is ignored (-100): look at what the collator makes of them; "
    "where rewards are learned from, all of a group may be equal; otherwise look for frozen parameters"
)
_LOSS_IS_NAN = "the loss is not a number, so most likely every label of the batch is ignored (-100): look at what the collator makes of them"
_DECAYED = (
    "Raise init_scale and min_scale, or train in BF16 or FP32; where skipped steps have lowered the scale so far, the events "
    "say why they were skipped."
)
_NO_GRADIENTS = (
    "Look whether the optimizer holds the parameters of the model that is trained (was it made before the model was wrapped, "
    "resized or replaced?), and whether any of them needs gradients."
)
