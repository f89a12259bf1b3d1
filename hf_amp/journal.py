"""`Journal`: what happened in one run, kept and handed to every sink."""

from __future__ import annotations

import threading
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from hf_amp.events import AmpEvent, EventKind
from hf_amp.monitoring.hopeless import Finding
from hf_amp.monitoring.sinks import console

EVENTS_KEPT = 10_000
"""Newest events that a session keeps; the JSON-lines log has all."""

INCIDENTS_A_LOG_ENTRY = 3
"""Incidents that one log entry names; the JSON-lines log has all."""


class Journal:
    """The part of `AmpSession` that knows nothing of precision: events, and where they go.

    Attributes:
        run_id: names the run in logs.
        sinks: called with every event.
        first_step: what the scaler's first decided step is called in events; 1, or later in a resumed run.
        newest_step: number of the newest optimizer step that is known; 0 before the first.
        lock: held while what people read is changed, so that other threads read it between two steps.
    """

    def __init__(self) -> None:
        self.run_id = uuid.uuid4().hex[:12]
        self.sinks: list[Callable[[AmpEvent], None]] = [console.Console().write]
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

    def record(self, event: AmpEvent) -> None:
        """Gives one event to every sink, and to the session's list unless it only repeats figures."""
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

    def tell(self, finding: Finding | None) -> None:
        """Records what the watch over the run's hope has found, if anything."""
        if finding is not None:
            self.record(AmpEvent(self.newest_step, finding.kind, finding.cause, message=finding.message))

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
        told = "; ".join(console.headline(event) for event in self._unlogged)
        self._unlogged.clear()
        return told
