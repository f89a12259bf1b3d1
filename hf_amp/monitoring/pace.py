"""How fast a run goes, by the host's clock between optimizer steps, which costs nothing and makes nothing wait."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection
from typing import Any

import torch

from hf_amp.monitoring.memory import peak_bytes
from hf_amp.plain import NotNegative, read

NEWEST_STEPS = 9
"""Intervals whose median is the step time: an evaluation or a checkpoint between two steps does not move it."""
LONGEST_PAUSE = 10.0
"""An interval of this many medians is a pause, and not counted as time in a precision."""


class Pace:
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
        saved = read(dict[str, dict[str, NotNegative]], state_dict, "pace")
        self.seconds_by_format = defaultdict(float, saved.get("seconds_by_format", {}))
