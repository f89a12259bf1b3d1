"""What became of a training run, in one sentence."""

from __future__ import annotations

import time
from collections import defaultdict

from hf_amp.events import AmpEvent
from hf_amp.fallback.plan import PrecisionPlan
from hf_amp.monitoring.sinks import console
from hf_amp.session import AmpSession


class RunSummary:
    """Watches the plan of `session` from when it is made until `close`; a sink for its events in between."""

    def __init__(self, session: AmpSession) -> None:
        self._session = session
        self._plan, self._since = session.plan, time.perf_counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        session.sinks.append(self.notice)

    def notice(self, event: AmpEvent | None = None) -> None:
        """Counts the time since the last call for the plan that was in force, and notices a new one."""
        now = time.perf_counter()
        self._seconds[_name_of(self._plan)] += now - self._since
        self._since = now
        self._plan = self._session.plan

    def close(self) -> None:
        """Stops watching. Harmless when called again."""
        if self.notice in self._session.sinks:
            self._session.sinks.remove(self.notice)

    def figures(self) -> dict[str, float]:
        """The session's metrics, and the seconds in each precision."""
        self.notice()
        seconds = {
            f"seconds_in_{name.replace(' ', '_')}": round(spent, 3) for name, spent in self._seconds.items()
        }
        return {**self._session.metrics(), **seconds}

    def sentence(self) -> str:
        """Steps applied and skipped by cause, transitions, final scale, time in each precision."""
        figures = self.figures()
        causes = [
            f"{value:g} {name.removeprefix('skipped_steps_').upper()}"
            for name, value in figures.items()
            if name.startswith("skipped_steps_")
        ]
        changes = figures["transitions"]
        parts = [
            f"{figures['applied_steps']:g} steps applied",
            f"{figures['skipped_steps']:g} skipped" + (f" ({', '.join(causes)})" if causes else ""),
            f"{changes:g} change{'' if changes == 1 else 's'} of precision",
            *(
                []
                if self._session.scaler.guards_only
                else [f"final scale {self._session.scaler.get_scale():g}"]
            ),
            *(f"{spent:.1f} s in {name}" for name, spent in self._seconds.items()),
        ]
        return ", ".join(parts)

    def show(self) -> None:
        """The sentence on the console: a warning where something happened, else for who asks for INFO."""
        figures = self._session.metrics()
        happened = figures["skipped_steps"] or figures["transitions"] or figures.get("non_finite_losses", 0)
        console.summarise(f"training ended: {self.sentence()}", bool(happened))


def _name_of(plan: PrecisionPlan) -> str:
    others = sorted({mode.value for mode in plan.modules.values()})
    return plan.default.value + (f" with modules in {', '.join(others)}" if others else "")
