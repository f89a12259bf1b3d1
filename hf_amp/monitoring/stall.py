"""When a run can learn nothing any more, and why."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Annotated, Any

from hf_amp.config import Allowed
from hf_amp.events import Cause, EventKind
from hf_amp.serialization import parse, parse_fields

CauseName = Annotated[
    str, Allowed("one of " + ", ".join(Cause.__members__), lambda v: v in Cause.__members__)
]


@dataclasses.dataclass(frozen=True)
class Finding:
    """What is to be told: a kind of event, its cause, and a sentence that says what to do."""

    kind: EventKind
    cause: Cause
    message: str


@dataclasses.dataclass
class StallDetector:
    """Counts steps in a row that taught the model nothing. Told once per row; a step that teaches ends it.

    Args:
        patience: steps in a row after which the run is hopeless. Poisoned weights are hopeless at once.
    """

    patience: int
    skipped_by_cause: Counter[CauseName] = dataclasses.field(default_factory=Counter)
    zero_steps: int = 0
    empty_steps: int = 0
    stalled: bool = False

    def record_skipped(self, cause: Cause) -> Finding | None:
        """One skipped step; what it shows of the run, where that is new."""
        self.skipped_by_cause[cause.value] += 1
        if cause is Cause.WEIGHTS:
            return self.mark_stalled(cause, "no step can mend weights that are not finite")
        if not self._patience_is_over():
            return None
        main = Cause(self.skipped_by_cause.most_common(1)[0][0])
        return self.mark_stalled(
            main, f"all of the last {self.patience} steps were skipped, most for {main.value}"
        )

    def record_applied(
        self, zero_gradients: bool, loss_finite: bool | None, scale: float, has_gradients: bool = True
    ) -> Finding | None:
        """One applied step; what it shows of the run, where that is new.

        Args:
            zero_gradients: every element of every gradient was exactly zero.
            loss_finite: whether its losses were finite; None where they were not seen.
            scale: the loss scale; 1 where nothing is scaled.
            has_gradients: whether any parameter had a gradient. One step without is nothing to tell: it may be another
                optimizer's turn.
        """
        if not has_gradients:
            self.empty_steps += 1
            reason = f"for {self.empty_steps} steps no parameter that the optimizer holds had a gradient"
            return (
                self.mark_stalled(Cause.UNKNOWN, reason, _NO_GRADIENTS) if self._patience_is_over() else None
            )
        if not zero_gradients:
            self.skipped_by_cause.clear()
            self.zero_steps, self.empty_steps, self.stalled = 0, 0, False
            return None
        self.zero_steps += 1
        flushed = loss_finite is not False and scale < 1
        cause = Cause.SCALE if flushed else Cause.LOSS
        if self._patience_is_over():
            return self.mark_stalled(cause, f"for {self.zero_steps} steps every gradient was exactly zero")
        if self.zero_steps > 1:
            return None
        shown = f"the scale of {scale:g} leaves nothing of them in FP16" if flushed else _LABELS[loss_finite]
        return Finding(
            EventKind.ZERO_GRADIENTS,
            cause,
            f"every gradient is exactly zero, and nothing was learned from this step: {shown}.",
        )

    def _patience_is_over(self) -> bool:
        return sum(self.skipped_by_cause.values()) + self.zero_steps + self.empty_steps >= self.patience

    def mark_stalled(self, cause: Cause, reason: str, remedy: str | None = None) -> Finding | None:
        """The run is hopeless for `reason`; None where that has been told. `remedy`: where it is not that of `cause`."""
        if self.stalled:
            return None
        self.stalled = True
        return Finding(
            EventKind.STALLED, cause, f"this run learns nothing: {reason}. {remedy or _REMEDIES[cause]}"
        )

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
        vars(self).update(
            parse_fields(
                StallDetector,
                {**parse(dict[str, Any], state_dict, "stall"), "patience": self.patience},
                "stall",
            )
        )


_MAYBE_LABELS = (
    "where the loss is 0.0 too, every label of the batch is ignored (-100): look at what the collator makes of them; "
    "where rewards are learned from, all of a group may be equal; otherwise look for frozen parameters"
)
_LABELS = {
    None: _MAYBE_LABELS,
    True: _MAYBE_LABELS,
    False: "the loss is not a number, so most likely every label of the batch is ignored (-100): look at what the "
    "collator makes of them",
}
_NO_GRADIENTS = (
    "Look whether the optimizer holds the parameters of the model that is trained (was it made before the model was wrapped, "
    "resized or replaced?), and whether any of them needs gradients."
)
_REMEDIES = {
    Cause.SCALE: "Train in BF16 or FP32, or lower init_scale and min_scale.",
    Cause.ACTIVATION: "Train the modules that the events name, or all, in BF16 or FP32.",
    Cause.INPUT: "Mend the data: batch after batch holds non-finite values.",
    Cause.WEIGHTS: "Go back to the last good checkpoint.",
    Cause.LOSS: "Look at the labels (is every one ignored?), at rewards (are all of a group equal?) and at the loss "
    "function.",
    Cause.UNKNOWN: "Look at the learning rate, the data, the labels and the loss function, or train in FP32 to see whether it is "
    "precision.",
}
