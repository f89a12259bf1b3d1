"""What happened in a run: the table of causes, a step's outcome, the closed list of events, and the recorder of them."""

from __future__ import annotations

import enum
import math
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LOG_FILE = "amp_events.jsonl"
"""What a run's log is called in its folder."""
EVENTS_KEPT = 10_000
"""Newest events that a session keeps; the JSON-lines log has all."""
INCIDENTS_A_LOG_ENTRY = 3
"""Incidents that one log entry names; the JSON-lines log has all."""


@dataclass(frozen=True)
class CauseFacts:
    """One row of the table of causes: all that the package knows of a cause, but for how it is found.

    Attributes:
        in_words: what was seen, in the past tense, to go on with after "skipped because".
        remedy: a sentence, for people, that says what to do where such skips go on.
        error: its name among `numerical_errors`.
        severity: where ranks find different causes the largest stands, because the others only see its traces.
        severity_unconfirmed: the same where it is only what remains when nothing else was seen.
        light: colour on a light page, `#rrggbb`. Source of the hues: Okabe and Ito, "Color Universal Design" (2008).
        dark: colour on a dark page.
        marker: its shape in pictures, for those who do not see colours, by matplotlib's name.
        to_do: a phrase for what cures it, under which causes are counted together; "" where hf_amp does it by itself.
        moves_scale: whether a smaller scale may cure it.
        moves_precision: whether a wider format may cure it.
        retries: how often loops of hf_amp's own run the same data again: as long as a new scale or plan may help. Source of
            the 2 where nothing was confirmed: fairseq's AMP trainer.
    """

    in_words: str
    remedy: str
    error: str
    severity: int
    severity_unconfirmed: int
    light: str
    dark: str
    marker: str
    to_do: str = "look at the events"
    moves_scale: bool = False
    moves_precision: bool = False
    retries: int = 0


class Cause(str, enum.Enum):
    """Why an optimizer step was skipped: the table of causes, one row each.

    A new cause is a row here, what finds it in `fallback/diagnosis.py`, and tests.
    """

    facts: CauseFacts

    def __new__(cls, name: str, facts: CauseFacts) -> Cause:
        cause = str.__new__(cls, name)
        cause._value_ = name
        cause.facts = facts
        return cause

    SCALE = "SCALE", CauseFacts(
        in_words="the scale was too large",
        remedy="Train in BF16 or FP32, or lower init_scale and min_scale.",
        to_do="", moves_scale=True, retries=32,
        error="gradient_overflow", severity=20, severity_unconfirmed=2,
        light="#c98300", dark="#f0b23e", marker="v",
    )  # fmt: skip
    ACTIVATION = "ACTIVATION", CauseFacts(
        in_words="an activation left the range",
        remedy="Train the modules that the events name, or all, in BF16 or FP32.",
        to_do="needs a wider format", moves_precision=True, retries=32,
        error="activation_overflow", severity=70, severity_unconfirmed=30,
        light="#c2410c", dark="#f58a5b", marker="D",
    )  # fmt: skip
    ROUNDING = "ROUNDING", CauseFacts(
        in_words="rounding made a value that is not finite",
        remedy="Train the modules that the events name, or all, in FP32.",
        to_do="needs a wider format", moves_precision=True, retries=32,
        error="rounding", severity=68, severity_unconfirmed=28,
        light="#8a6d1f", dark="#d8bf6a", marker="d",
    )  # fmt: skip
    MODEL = "MODEL", CauseFacts(
        in_words="the model computed non-finite values in FP32 too",
        remedy="Look at the operators that the events name: a division by zero, a log or root of zero, a mean of nothing; or "
        "everything has grown, as with too high a learning rate.",
        to_do="change the model", error="non_finite_model", severity=62, severity_unconfirmed=3,
        light="#1f6f9f", dark="#6db7e3", marker="p",
    )  # fmt: skip
    INPUT = "INPUT", CauseFacts(
        in_words="the batch held non-finite values",
        remedy="Fix the data, or drop batches that hold non-finite values.",
        to_do="fix the data or the loss", error="non_finite_input", severity=80, severity_unconfirmed=8,
        light="#7a4fa3", dark="#b794e0", marker="s",
    )  # fmt: skip
    LOSS = "LOSS", CauseFacts(
        in_words="the loss was not finite",
        remedy="Look at the labels (is every one ignored?), at rewards (are all of a group equal?) and at the loss function.",
        to_do="fix the data or the loss", error="non_finite_loss", severity=60, severity_unconfirmed=0,
        light="#b5527f", dark="#e28fb4", marker="^",
    )  # fmt: skip
    WEIGHTS = "WEIGHTS", CauseFacts(
        in_words="parameters were not finite",
        remedy="Go back to the last good checkpoint.",
        to_do="go back to a good checkpoint", error="non_finite_weights", severity=90, severity_unconfirmed=9,
        light="#a3182a", dark="#f0707f", marker="X",
    )  # fmt: skip
    BUFFER = "BUFFER", CauseFacts(
        in_words="a buffer was not finite",
        remedy="Go back to the last good checkpoint, or reset the buffers that the events name.",
        to_do="go back to a good checkpoint", error="non_finite_buffer", severity=86, severity_unconfirmed=6,
        light="#0f766e", dark="#4fc3b5", marker="h",
    )  # fmt: skip
    DERIVATIVE = "DERIVATIVE", CauseFacts(
        in_words="a derivative was not finite",
        remedy="Keep roots, norms and divisions away from zero in what the events name: x.clamp(min=1e-6) before, not torch.where after.",
        to_do="change the model", error="non_finite_derivative", severity=65, severity_unconfirmed=4,
        light="#2f7d6b", dark="#6cc9b2", marker="P",
    )  # fmt: skip
    UNKNOWN = "UNKNOWN", CauseFacts(
        in_words="no cause could be confirmed",
        remedy="Look at the learning rate, the data, the labels and the loss function, or train in FP32 to see whether it is "
        "precision.",
        moves_scale=True, moves_precision=True, retries=2,
        error="unknown", severity=50, severity_unconfirmed=10,
        light="#66717e", dark="#97a2ae", marker="o",
    )  # fmt: skip


@dataclass(frozen=True)
class StepOutcome:
    """What became of one optimizer step, as known on the host.

    Attributes:
        attempt: number of the step among all that the scaler decided, from 1.
        applied: whether the optimizer moved anything; where not, parameters and optimizer state are as before.
        scale: the scale that the gradients' backward used.
        backward: number of the backward that made the gradients; the same for optimizers that step from one.
        loss_finite: whether every loss behind the gradients was finite; None where the scaler saw no loss.
        losses: how many losses (micro-batches) the scaler saw behind the gradients, each reported by one step alone, where
            one backward makes gradients for several optimizers.
        non_finite_losses: how many of them were not finite; with several processes, on the worst of them.
        zero_gradients: whether there are gradients and every element of them is exactly zero: nothing is learned.
        has_gradients: whether any parameter had a gradient.
        grad_norm: 2-norm of the unscaled gradients before clipping; None where unknown or not finite.
        grad_amax: largest magnitude of the same; None likewise.
        underflow_fraction: share of scaled gradient elements that FP16 has made subnormal or zero; None where not known.
        lost_update_fraction: share of low-precision parameter elements that the newest sampled step, an earlier one, did
            not change; None where none was sampled since the last outcome.
        inf_elements: infinite gradient elements of a skipped step, as they are when it is decided: a plain clip before
            has made all of them NaN, a fused one has not. None where not counted.
        nan_elements: NaN gradient elements, likewise.
        left_out_by: the rank that has left the step out after its backward, so that all skip it; None where none has.
        extras: what the scaler's `step_hooks` asked for, by the names of `statistics.to_host`.
    """

    attempt: int
    applied: bool
    scale: float
    backward: int = 0
    loss_finite: bool | None = None
    losses: int = 0
    non_finite_losses: int = 0
    zero_gradients: bool = False
    has_gradients: bool = True
    grad_norm: float | None = None
    grad_amax: float | None = None
    underflow_fraction: float | None = None
    lost_update_fraction: float | None = None
    inf_elements: int | None = None
    nan_elements: int | None = None
    left_out_by: int | None = None
    extras: Mapping[str, float] = field(default_factory=dict)

    def non_finite_fraction(self, elements: int) -> float:
        """Share of the step's gradient `elements` that are not finite; 1 where they were not counted."""
        if self.inf_elements is None or self.nan_elements is None or not elements:
            return 1.0
        return (self.inf_elements + self.nan_elements) / elements


class EventKind(str, enum.Enum):
    """The closed list of events."""

    ATTACHED = "attached"
    DETACHED = "detached"
    STEP_SKIPPED = "step_skipped"
    FORWARD_RAISED = "forward_raised"
    """A forward pass, or the loss made from it, raised an exception because of values that are not finite."""
    BUFFERS_RESTORED = "buffers_restored"
    """Buffers, of which a skipped step had made some non-finite, are what they were before it."""
    SETUP = "setup"
    """Something in how the run is set up that limits hf_amp, or that is most likely a mistake."""
    SCALE_AT_FLOOR = "scale_at_floor"
    PRECISION_CHANGED = "precision_changed"
    HALF_PARAMETERS = "half_parameters"
    PARAMETERS_CONVERTED = "parameters_converted"
    MASTER_WEIGHTS_KEPT = "master_weights_kept"
    UPDATES_ROUNDED = "updates_rounded"
    """Half-precision parameters are rounded so that no update is lost: stochastically, or with their rounding error kept."""
    FROZEN = "frozen"
    """Half-precision parameters stand still, because rounding loses their updates; reported once."""
    ZERO_GRADIENTS = "zero_gradients"
    """An applied step whose gradients are all exactly zero; reported for the first of several in a row."""
    LOSS_LOST = "loss_lost"
    """An applied step whose loss was not finite; reported for the first of several in a row."""
    FP8_MEASURED = "fp8_measured"
    """What FP8 by torchao changes of the outputs, as far as it could be measured: rounding, and no layer of its own."""
    FP8_DAMAGE = "fp8_damage"
    """Layers in which FP8 by torchao loses more than rounding; reported once, early in a run."""
    STALLED = "stalled"
    """Nothing can be learned any more."""
    RANKS_PARTED = "ranks_parted"
    """Ranks have gone different ways, and none can go on: each says so on its console, and ends."""
    TRAINING_STOPPED = "training_stopped"
    """A stalled run was stopped, as configured."""
    EVALUATION_LOST_BATCHES = "evaluation_lost_batches"
    """The evaluation loss leaves out batches whose loss was not finite."""
    CHECKPOINT_WITHHELD = "checkpoint_withheld"
    """A checkpoint with non-finite weights or buffers was not written."""
    CHECKPOINT_NON_FINITE = "checkpoint_non_finite"
    """`save_state` has written such a checkpoint, as it was told to."""
    CHECKPOINT_GOOD = "checkpoint_good"
    """So many clean steps came after a checkpoint that it is good."""
    LOSS_SPIKE = "loss_spike"
    """The loss of an applied step is far above those before it."""
    REWOUND = "rewound"
    """The run has gone back to a good checkpoint, without the steps since."""
    NOT_REWOUND = "not_rewound"
    """It was to go back, and could not."""
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
    EventKind.ATTACHED, EventKind.DETACHED, EventKind.MASTER_WEIGHTS_KEPT, EventKind.UPDATES_ROUNDED, EventKind.METRICS,
    EventKind.BUFFERS_RESTORED, EventKind.CHECKPOINT_GOOD, EventKind.FP8_MEASURED, EventKind.TRAINING_STARTED,
    EventKind.TRAINING_ENDED, EventKind.RANKS_PARTED,
)  # fmt: skip


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

    def headline(self) -> str:
        """What happened, why and where: "step 3: step_skipped (ACTIVATION) in h.0.mlp". One line, no control characters."""
        cause = f" ({self.cause.value})" if self.cause else ""
        names = [name or "the model" for name in self.modules]  # its own name is ""
        where = f" in {join_names(names)}" if names else ""
        return printable(f"step {self.step}: {self.kind.value}{cause}{where}")


def join_names(names: Sequence[str], most: int = 3) -> str:
    """The first of `names`, and how many more there are: a sentence names a few, the event has all."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def counted_names(names: Sequence[str], noun: str = "parameter") -> str:
    """ "1 parameter (h.0.weight)", "5 parameters (a, b, c and 2 more)"."""
    return f"{len(names)} {noun}{'' if len(names) == 1 else 's'} ({join_names(names)})"


SECONDS_BETWEEN_REPEATS = 10.0


class RepeatLimit:
    """Which of things alike to show: the first, then one each time that their number has doubled and ten seconds have passed.

    Args:
        clock: gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[Any, tuple[int, int, float]] = {}  # how many; how many when the newest was shown, and when

    def count(self, alike: Any) -> tuple[int, bool]:
        """One more of those: how many there are, and whether to show it."""
        times, shown, since = self._seen.get(alike, (0, 0, -math.inf))
        times, now = times + 1, self._clock()
        shows = times >= 2 * shown and now >= since + SECONDS_BETWEEN_REPEATS
        self._seen[alike] = (times, times, now) if shows else (times, shown, since)
        return times, shows


def printable(text: str) -> str:
    """`text` from a run, with control characters and everything else that does not print shown as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class EventRecorder:
    """The part of `AmpSession` that knows nothing of precision: events, and where they go.

    Args:
        sinks: called with every event.

    Attributes:
        run_id: names the run in logs.
        first_step: what the scaler's first decided step is called in events; 1, or later in a resumed run.
        newest_step: number of the newest optimizer step that is known; 0 before the first.
        lock: held while what people read is changed, so that other threads read it between two steps.
    """

    def __init__(self, sinks: list[Callable[[AmpEvent], None]]) -> None:
        self.run_id = uuid.uuid4().hex[:12]
        self.sinks = sinks
        self.first_step = 1
        self.newest_step = 0
        self.lock = threading.RLock()
        self._events: deque[AmpEvent] = deque(maxlen=EVENTS_KEPT)
        self._unlogged: deque[AmpEvent] = deque(maxlen=INCIDENTS_A_LOG_ENTRY)
        self._unwritten: deque[AmpEvent] | None = deque(maxlen=EVENTS_KEPT)

    @property
    def events(self) -> Sequence[AmpEvent]:
        """What happened, oldest first; at most the newest 10,000."""
        with self.lock:
            return tuple(self._events)

    def record(self, event: AmpEvent | None) -> None:
        """Gives an event, if there is one, to every sink, and to the session's list unless it only repeats figures."""
        if event is None:
            return
        if event.kind is not EventKind.METRICS:
            with self.lock:
                self._events.append(event)
        if event.kind.needs_attention:
            self._unlogged.append(event)
        if self._unwritten is not None:
            self._unwritten.append(event)
        for sink in self.sinks:
            sink(event)

    def note(self, kind: EventKind, message: str, **figures: Any) -> None:
        """Records an event of the newest step that has no cause and changes no value."""
        self.record(AmpEvent(self.newest_step, kind, message=message, figures=figures))

    def begin_log(self, write: Callable[[AmpEvent], None], message: str, **figures: Any) -> None:
        """Makes `write` a sink: it gets that training starts, what happened before while no log was open, and all to come."""
        self.sinks.append(write)
        before, self._unwritten = self._unwritten, None
        self.note(EventKind.TRAINING_STARTED, message, **figures)
        for event in before or ():
            write(event)

    def end_log(self, write: Callable[[AmpEvent], None]) -> None:
        """Takes `write` out of the sinks; what happens from now on is kept for the next log."""
        self.sinks.remove(write)
        self._unwritten = deque(maxlen=EVENTS_KEPT)

    def unlogged_incidents(self) -> str:
        """What needed attention since the last call, for one log entry: the newest three; "" where nothing did."""
        joined = "; ".join(event.headline() for event in self._unlogged)
        self._unlogged.clear()
        return joined
