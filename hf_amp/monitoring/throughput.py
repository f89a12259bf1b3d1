"""`ThroughputMonitor`: step time, throughput, and time in each precision, without making the device wait.

A session feeds it by `step_decided` between optimizer steps; a loop of your own by `start_step` and `end_step` around them.
`PerformanceTracker` is another name for it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from hf_amp.config import MixedPrecisionConfig
from hf_amp.device import default_device, new_event
from hf_amp.precision import PrecisionMode
from hf_amp.serialization import NotNegative, parse

STEPS_OF_MEDIAN = 9
"""Newest intervals whose median is the step time: an evaluation or a checkpoint between two steps does not move it."""
STEPS_OF_PERCENTILES = 1000
"""Newest steps that percentiles are of."""
LONGEST_PAUSE = 10.0
"""An interval of this many medians is a pause, and not counted as time in a precision."""


class _QueuedStep(NamedTuple):
    """A step that the device may not have finished."""

    start: torch.Event
    end: torch.Event
    samples: int
    precision: str


class ThroughputMonitor:
    """Step times, throughput, and the time in each precision. Constant size, however long the run.

    Between two decided steps the host's clock gives the time of a step where the host keeps up with the device: always
    where a step waits for it, on the average where it does not. Around a step (`start_step`, `end_step`) two events of the
    device's stream do, on CUDA, which are asked for later and never waited for; elsewhere the host's clock.

    Args:
        config: options; None for the defaults.
        device: where the steps run; None for the accelerator where there is one, else the CPU.
        clock: seconds that only grow; None for the machine's.

    Attributes:
        samples_per_step: rows of all batches of all processes in one optimizer step; None where it is not known.
        seconds_by_format: name of a number format → seconds of steps that ran in it.
        newest_step_seconds: duration of the newest step that is known; NaN before the first.
    """

    def __init__(
        self,
        config: MixedPrecisionConfig | None = None,
        device: torch.device | str | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        config = MixedPrecisionConfig.or_default(config, type(self).__name__)
        self.device = default_device() if device is None else torch.device(device)
        self.samples_per_step: int | None = None
        self.seconds_by_format: defaultdict[str, float] = defaultdict(float)
        self.newest_step_seconds = math.nan
        self._default = (config.precision_mode or PrecisionMode.MIXED).number_format.name
        self._clock = clock or time.perf_counter
        self._decided_at: float | None = None
        self._recent: deque[float] = deque(maxlen=STEPS_OF_PERCENTILES)
        self._steps = 0
        self._samples = 0
        self._range = (math.inf, -math.inf)
        self._start: Any = None
        self._queued: deque[_QueuedStep] = deque()  # bounded by what CUDA lets the host queue ahead

    def step_decided(self, number_format: str) -> float | None:
        """An optimizer step was decided, in a run whose default is now the format of that name. No GPU-CPU sync.

        Returns:
            Seconds since the one before; None after a pause.
        """
        now, interval = self._clock(), None
        if self._decided_at is not None:
            interval = now - self._decided_at
            self._recent.append(interval)
            if interval < LONGEST_PAUSE * self._median():
                self.seconds_by_format[number_format] += interval
        self._decided_at = now
        return interval

    def pause(self) -> None:
        """Time until the next step is not a step's: training ends, or begins again."""
        self._decided_at = None

    def _median(self) -> float:
        newest = [self._recent[i] for i in range(-min(STEPS_OF_MEDIAN, len(self._recent)), 0)]
        return statistics.median(newest)

    def start_step(self) -> None:
        """A step begins; one that was begun and not ended is forgotten. No GPU-CPU sync."""
        self._start = self._mark()

    def end_step(self, samples: int, precision: str | None = None) -> None:
        """The step that was begun is queued to its end. No GPU-CPU sync.

        Args:
            samples: rows of the batches that went into it.
            precision: name of the number format that it ran in; None for the config's.
        """
        if self._start is None:
            return
        precision = precision if precision is not None else self._default
        start, self._start = self._start, None
        if self.device.type != "cuda":
            self._add(self._clock() - start, samples, precision)
            return
        self._queued.append(_QueuedStep(start, self._mark(), samples, precision))
        while self._queued and self._queued[0].end.query():
            self._finish_queued()

    def drop_step(self) -> None:
        """The step that was begun does not count."""
        self._start = None

    @contextmanager
    def step(self, samples: int, precision: str | None = None) -> Iterator[None]:
        """`with tracker.step(samples=8): ...` around one step; one that raises does not count."""
        self.start_step()
        try:
            yield
        except BaseException:
            self.drop_step()
            raise
        self.end_step(samples, precision)

    def _mark(self) -> Any:
        return new_event(self.device, timed=True) if self.device.type == "cuda" else self._clock()

    def _finish_queued(self) -> None:
        done = self._queued.popleft()
        self._add(done.start.elapsed_time(done.end) / 1000, done.samples, done.precision)

    def _add(self, seconds: float, samples: int, precision: str) -> None:
        self.newest_step_seconds = seconds
        self._recent.append(seconds)
        self._steps += 1
        self._samples += samples
        self._range = (min(seconds, self._range[0]), max(seconds, self._range[1]))
        self.seconds_by_format[precision] += seconds

    def metrics(self) -> dict[str, float]:
        """Catalogue name → value; what is not known is absent. No GPU-CPU sync."""
        figures = {f"{name.lower()}_seconds": seconds for name, seconds in sorted(self.seconds_by_format.items())}
        if self._recent:
            figures["step_seconds"] = seconds = self._median()
            if self.samples_per_step is not None and seconds > 0:
                figures["samples_per_second"] = self.samples_per_step / seconds
        return figures

    def get_stats(self) -> dict[str, Any]:
        """The steps between `start_step` and `end_step` so far; waits for the device to finish those that were queued.

        Returns:
            `steps`, `total_seconds`; `avg_step_time`, `step_time_min`, `step_time_max`: seconds; `step_time_p50`, `_p90`,
            `_p99`: the same of the newest 1,000; `avg_throughput`: samples a second; NaN before the first step.
            `time_share`: name of a number format → share of the seconds. `clock`: "device" or "host", what the seconds are
            read from.
        """
        while self._queued:
            self._queued[0].end.synchronize()
            self._finish_queued()
        total = sum(self.seconds_by_format.values())
        ordered = sorted(self._recent)
        return {
            "steps": self._steps,
            "total_seconds": total,
            "avg_step_time": total / self._steps if self._steps else math.nan,
            **{f"step_time_p{percent}": _percentile(ordered, percent) for percent in (50, 90, 99)},
            "step_time_min": self._range[0] if self._steps else math.nan,
            "step_time_max": self._range[1] if self._steps else math.nan,
            "avg_throughput": self._samples / total if total else math.nan,
            "time_share": {name: seconds / total for name, seconds in self.seconds_by_format.items()},
            "clock": "device" if self.device.type == "cuda" else "host",
        }

    def state_dict(self) -> dict[str, Any]:
        """The time in each precision, which a resumed run adds to."""
        return {"seconds_by_format": dict(self.seconds_by_format)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from `state_dict`.

        Raises:
            StateError: it is no such state; nothing has changed then.
        """
        saved = parse(dict[str, dict[str, NotNegative]], state_dict, "throughput")
        self.seconds_by_format = defaultdict(float, saved.get("seconds_by_format", {}))


PerformanceTracker = ThroughputMonitor


def _percentile(ordered: list[float], percent: int) -> float:
    """The smallest of `ordered` that `percent` of 100 do not exceed; NaN where there are none."""
    return ordered[max(math.ceil(len(ordered) * percent / 100) - 1, 0)] if ordered else math.nan
