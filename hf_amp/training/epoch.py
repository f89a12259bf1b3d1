"""What an epoch keeps track of: its losses, its progress bar, its learning-rate schedule."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Sequence, Sized
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from hf_amp.statistics import snapshot
from hf_amp.training.batch import samples_in

_LOSSES_IN_ONE_TENSOR = 256
_SECONDS_BETWEEN_LOSSES = 1.0


class EpochLosses:
    """The losses of an epoch, on their device until its end.

    Attributes:
        batches: how many there were.
    """

    def __init__(self) -> None:
        self.batches = 0
        self._samples: list[int] = []
        self._started = time.perf_counter()
        self._whole: list[Tensor] = []
        self._newest: list[Tensor] = []

    def add(self, losses: Sequence[Tensor], batches: Sequence[Any]) -> None:
        """The losses of some batches, each of shape []; copied, because a CUDA graph writes the next ones there. No host read."""
        self.batches += len(batches)
        self._samples += [samples_in(batch) for batch in batches]
        self._newest += [loss.clone() for loss in losses]
        if len(self._newest) >= _LOSSES_IN_ONE_TENSOR:
            self._whole.append(torch.stack(self._newest))
            self._newest = []

    def figures(self) -> dict[str, Any]:
        """Losses, mean over the finite ones by samples, counts and speed. Reads the host once."""
        newest = [torch.stack(self._newest)] if self._newest else []
        losses = snapshot.read_vector(torch.cat(self._whole + newest))
        seconds = time.perf_counter() - self._started
        pairs = zip(losses, self._samples, strict=True)
        finite = [(loss, samples) for loss, samples in pairs if math.isfinite(loss)]
        weight = sum(samples for _, samples in finite)
        total = sum(self._samples)
        return {
            "losses": losses,
            "loss": sum(loss * samples for loss, samples in finite) / weight if weight else math.nan,
            "batches": self.batches,
            "samples": total,
            "non_finite_losses": len(losses) - len(finite),
            "seconds": seconds,
            "samples_per_second": total / seconds,
        }


class Progress:
    """A progress bar on stderr, or none.

    Args:
        batches: what the bar runs over; its length is shown where it has one.
        shown: None for only where stderr is a terminal.
        title: stands before it.
    """

    def __init__(self, batches: Iterable[Any], shown: bool | None, title: str) -> None:
        self._bar: Any = None
        self._read_at = -math.inf
        self._loss = math.nan
        if shown or (shown is None and sys.stderr.isatty()):
            from tqdm.auto import tqdm  # a dependency of transformers and datasets

            total = len(batches) if isinstance(batches, Sized) else None
            self._bar = tqdm(total=total, desc=title, unit="batch", file=sys.stderr)

    def advance(self, result: dict[str, Any], batches: int) -> None:
        """One optimizer step is over. Reads its loss where a second has passed since the last."""
        if self._bar is None:
            return
        now = time.monotonic()
        if now - self._read_at >= _SECONDS_BETWEEN_LOSSES:
            self._read_at, self._loss = now, snapshot.read({"loss": result["loss"]})["loss"]
            scale = {} if result["scale"] is None else {"scale": f"{result['scale']:g}"}
            self._bar.set_postfix(loss=f"{self._loss:.4f}", **scale, refresh=False)
        self._bar.update(batches)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def step_schedule(scheduler: Any, result: dict[str, Any]) -> None:
    """Moves the learning-rate schedule by the optimizer step that `result` tells of, unless that was skipped.

    A skip that only the device knows of (PERFORMANCE_OPTIMIZED with a fused optimizer) does not hold it back.
    """
    if scheduler is not None and result["stepped"] and not result["skipped"]:
        scheduler.step()
