"""Which precision is the fastest on this device: each is run for a few steps and timed."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from hf_amp.precision import PrecisionMode

WARMUP_STEPS = 3
"""Steps of a candidate that are not timed: kernels are chosen, caches filled, code compiled."""
TIMED_STEPS = 8
"""Steps of a candidate whose median counts, which a slow batch or an evaluation in between does not move."""


class SpeedTrial:
    """Times the candidates one after the other, in steps of the run itself.

    Args:
        candidates: precisions, from the narrowest to the widest; none that the run may not use.
    """

    def __init__(self, candidates: Sequence[PrecisionMode]) -> None:
        self._seconds: dict[PrecisionMode, list[float]] = {mode: [] for mode in candidates}
        self._unstable: set[PrecisionMode] = set()

    @property
    def running(self) -> PrecisionMode | None:
        """The candidate that is being timed; None when the trial is over."""
        for mode, seconds in self._seconds.items():
            if mode not in self._unstable and len(seconds) < WARMUP_STEPS + TIMED_STEPS:
                return mode
        return None

    def note(self, step_seconds: float) -> None:
        """One applied step of the running candidate, as seconds of wall-clock time."""
        if self.running is not None:
            self._seconds[self.running].append(step_seconds)

    def reject(self) -> None:
        """Drops the running candidate, which was not stable."""
        if self.running is not None:
            self._unstable.add(self.running)

    def step_seconds(self) -> dict[PrecisionMode, float]:
        """Candidate → median seconds a step, of those that were stable and are through."""
        full = WARMUP_STEPS + TIMED_STEPS
        return {
            mode: median(seconds[WARMUP_STEPS:])
            for mode, seconds in self._seconds.items()
            if mode not in self._unstable and len(seconds) >= full
        }

    def fastest(self) -> PrecisionMode:
        """The stable candidate with the shortest step; the widest where none was stable."""
        timed = self.step_seconds()
        return min(timed, key=lambda mode: timed[mode]) if timed else list(self._seconds)[-1]

    def choices(self) -> tuple[PrecisionMode, ...]:
        """The ladder of a run in the fastest precision: that one, and those that are wider."""
        order = list(self._seconds)
        return tuple(order[order.index(self.fastest()) :])

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and mappings of them."""
        return {
            "seconds": {mode.value: list(seconds) for mode, seconds in self._seconds.items()},
            "unstable": sorted(mode.value for mode in self._unstable),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from `state_dict`; candidates that this run does not have are left out."""
        for mode in self._seconds:
            self._seconds[mode] = [float(s) for s in state_dict["seconds"].get(mode.value, [])]
        self._unstable = {PrecisionMode(value) for value in state_dict["unstable"]} & set(self._seconds)
