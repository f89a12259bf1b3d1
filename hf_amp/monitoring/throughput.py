"""How fast a run goes, by the host's clock between optimizer steps, which costs nothing and makes nothing wait."""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from hf_amp.config import MixedPrecisionConfig
from hf_amp.monitoring.memory import peak_bytes
from hf_amp.monitoring.monitor import Quantiles, RunningStatistics
from hf_amp.precision import NumberFormat, PrecisionMode
from hf_amp.serialization import NotNegative, parse

NEWEST_STEPS = 9
"""Intervals whose median is the step time: an evaluation or a checkpoint between two steps does not move it."""
LONGEST_PAUSE = 10.0
"""An interval of this many medians is a pause, and not counted as time in a precision."""


class ThroughputMonitor:
    """Step time, throughput, time in each precision, and device memory of one run.

    The interval between two decided steps is the wall-clock time of a step where the host keeps pace with the device:
    always where a step reads the host, on the average where it does not. No host read.

    Args:
        device: where the run is as long as nobody has said more; a type such as "cuda" is its current device.
        clock: seconds that only grow.

    Attributes:
        devices: where the models are; the peak memory of the fullest is told, where PyTorch counts it (CUDA).
        samples_per_step: rows of all batches of all processes in one optimizer step; None where nobody has said.
        seconds_by_format: name of a number format → seconds of steps that ran in it.
    """

    def __init__(self, device: torch.device | str, clock: Callable[[], float] = time.perf_counter) -> None:
        self.devices: Collection[torch.device] = (torch.device(device),)
        self.samples_per_step: int | None = None
        self.seconds_by_format: defaultdict[str, float] = defaultdict(float)
        self._clock = clock
        self._last: float | None = None
        self._newest: deque[float] = deque(maxlen=NEWEST_STEPS)

    def step_decided(self, number_format: str) -> float | None:
        """An optimizer step was decided, in a run whose default is now the format of that name.

        Returns:
            Seconds since the one before; None after a pause.
        """
        now, interval = self._clock(), None
        if self._last is not None:
            interval = now - self._last
            self._newest.append(interval)
            if interval < LONGEST_PAUSE * statistics.median(self._newest):
                self.seconds_by_format[number_format] += interval
        self._last = now
        return interval

    def pause(self) -> None:
        """Time until the next step is not a step's: training ends, or begins again."""
        self._last = None

    def metrics(self) -> dict[str, float]:
        """Catalogue name → value; what is not known is absent."""
        figures: dict[str, float] = {
            f"{name.lower()}_seconds": seconds for name, seconds in sorted(self.seconds_by_format.items())
        }
        if self._newest:
            seconds = statistics.median(self._newest)
            figures["step_seconds"] = seconds
            if self.samples_per_step is not None and seconds > 0:
                figures["samples_per_second"] = self.samples_per_step / seconds
        peak = peak_bytes(self.devices)
        if peak is not None:
            figures["memory_bytes"] = float(peak)
        return figures

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


class _Flight(NamedTuple):
    """A step that the device may not have finished."""

    start: Any
    end: Any
    samples: int
    precision: str


class PerformanceTracker:
    """Step times, throughput, and the share of time in each precision. Constant size, however long the run.

    On CUDA a step lies between two events of its stream, which are asked for later and never waited for; elsewhere
    between two readings of the host's clock, which on an asynchronous device is when work was queued.

    Args:
        config: options; None for the defaults.
        device: where the steps run; None for CUDA's current device where there is one, else the CPU.

    Attributes:
        newest_step_seconds: duration of the newest step that is known; NaN before the first.
    """

    def __init__(
        self, config: MixedPrecisionConfig | None = None, device: torch.device | str | None = None
    ) -> None:
        config = MixedPrecisionConfig.or_default(config, "PerformanceTracker")
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.newest_step_seconds = math.nan
        self._default = NumberFormat.of(config.precision_mode or PrecisionMode.MIXED).name
        self._seconds = RunningStatistics()
        self._quantiles = Quantiles()
        self._samples = 0
        self._by_precision: dict[str, float] = {}
        self._start: Any = None
        # Bounded by what CUDA lets the host queue ahead.
        self._flights: deque[_Flight] = deque()
        # To be used again, each on the device that it was first recorded on: CUDA knows it on no other.
        self._events: defaultdict[torch.device, list[Any]] = defaultdict(list)

    def start_step(self) -> None:
        """A step begins; one that was begun and not ended is forgotten. No host read."""
        self._start = self._mark()

    def end_step(self, samples: int, precision: str | None = None) -> None:
        """The step that was begun is queued to its end. No host read.

        Args:
            samples: rows of the batches that went into it.
            precision: name of the number format that it ran in; None for the config's.
        """
        if self._start is None:
            return
        precision = precision if precision is not None else self._default
        start, self._start = self._start, None
        if self.device.type != "cuda":
            self._add(time.perf_counter() - start, samples, precision)
            return
        self._flights.append(_Flight(start, self._mark(), samples, precision))
        while self._flights and self._flights[0].end.query():
            self._land()

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

    def get_stats(self) -> dict[str, Any]:
        """The run so far; waits for the device to finish the steps that were queued.

        Returns:
            `steps`, `total_seconds`; `avg_step_time`, `step_time_p50`, `_p90`, `_p99` (within 0.6%), `_min`, `_max`:
            seconds; `avg_throughput`: samples a second; NaN before the first step. `time_share`: name of a number
            format → share of the seconds. `clock`: "device" or "host", what the seconds are read from.
        """
        while self._flights:
            self._flights[0].end.synchronize()
            self._land()
        steps, total = self._seconds.count, sum(self._by_precision.values())
        return {
            "steps": steps,
            "total_seconds": total,
            "avg_step_time": self._seconds.mean if steps else math.nan,
            **{f"step_time_p{percent}": self._quantiles.at(percent / 100) for percent in (50, 90, 99)},
            "step_time_min": math.nan if self._seconds.smallest is None else self._seconds.smallest,
            "step_time_max": math.nan if self._seconds.largest is None else self._seconds.largest,
            "avg_throughput": self._samples / total if total else math.nan,
            "time_share": {name: seconds / total for name, seconds in self._by_precision.items()},
            "clock": "device" if self.device.type == "cuda" else "host",
        }

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        stream = torch.cuda.current_stream(self.device)
        free = self._events[stream.device]
        event = free.pop() if free else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(stream)
        return event

    def _land(self) -> None:
        flight = self._flights.popleft()
        self._add(flight.start.elapsed_time(flight.end) / 1000, flight.samples, flight.precision)
        self._events[flight.start.device] += [flight.start, flight.end]

    def _add(self, seconds: float, samples: int, precision: str) -> None:
        self.newest_step_seconds = seconds
        self._seconds.add(seconds)
        self._quantiles.add(seconds)
        self._samples += samples
        self._by_precision[precision] = self._by_precision.get(precision, 0.0) + seconds
