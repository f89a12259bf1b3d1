"""What happened: the record that the log, the metrics and the session all get."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

LOG_FILE = "amp_events.jsonl"
"""What a run's log is called in its folder."""


class Cause(str, enum.Enum):
    """Why an optimizer step was skipped."""

    SCALE = "SCALE"
    """Finite loss; a smaller scale cures it."""
    ACTIVATION = "ACTIVATION"
    """A forward value left the format's range."""
    INPUT = "INPUT"
    """The batch holds non-finite values."""
    WEIGHTS = "WEIGHTS"
    """The parameters hold non-finite values."""
    LOSS = "LOSS"
    """Finite outputs, non-finite loss."""
    UNKNOWN = "UNKNOWN"
    """None of the above could be shown."""


class EventKind(str, enum.Enum):
    """The closed list of events."""

    ATTACHED = "attached"
    DETACHED = "detached"
    STEP_SKIPPED = "step_skipped"
    BUFFERS_RESTORED = "buffers_restored"
    """Running statistics of batch norms, which a skipped step had made non-finite, are what they were before it."""
    SCALE_AT_FLOOR = "scale_at_floor"
    PRECISION_CHANGED = "precision_changed"
    HALF_PARAMETERS = "half_parameters"
    PARAMETERS_CONVERTED = "parameters_converted"
    MASTER_WEIGHTS_KEPT = "master_weights_kept"
    ZERO_GRADIENTS = "zero_gradients"
    """An applied step whose gradients are all exactly zero; told for the first of several in a row."""
    STALLED = "stalled"
    """Nothing can be learned any more."""
    TRAINING_STOPPED = "training_stopped"
    """A hopeless run was stopped, as configured."""
    EVALUATION_LOST_BATCHES = "evaluation_lost_batches"
    """The evaluation loss leaves out batches whose loss was not finite."""
    CHECKPOINT_WITHHELD = "checkpoint_withheld"
    """A checkpoint with non-finite weights was not written."""
    STATE_LOADED = "state_loaded"
    TRAINING_STARTED = "training_started"
    TRAINING_ENDED = "training_ended"
    METRICS = "metrics"
    """The newest figures, at a logging step: for the log, not for a session's list."""

    @property
    def needs_attention(self) -> bool:
        """Whether the event is worth a console line."""
        return self not in _AS_EXPECTED


_AS_EXPECTED = (
    EventKind.ATTACHED,
    EventKind.DETACHED,
    EventKind.MASTER_WEIGHTS_KEPT,
    EventKind.METRICS,
    EventKind.BUFFERS_RESTORED,
    EventKind.TRAINING_STARTED,
    EventKind.TRAINING_ENDED,
)


def join_names(names: Sequence[str], most: int = 3) -> str:
    """The first of `names`, and how many more there are: a sentence names a few, the event has all."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@dataclass(frozen=True)
class AmpEvent:
    """One thing that happened.

    Attributes:
        step: optimizer step at which it happened, counted from 1; 0 is before the first.
        kind: what happened.
        cause: why; None where nothing went wrong.
        before: the value that changed (a scale, a precision), before.
        after: the same, after.
        modules: qualified names of the modules concerned; empty for the whole model.
        message: one sentence for people, with what to do where something is to be done.
    """

    step: int
    kind: EventKind
    cause: Cause | None = None
    before: float | str | None = None
    after: float | str | None = None
    modules: tuple[str, ...] = ()
    message: str = ""
    figures: dict[str, Any] = field(default_factory=dict, hash=False)
    """Figures that belong to the event, by catalogue name."""
