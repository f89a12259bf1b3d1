"""What TensorBoard shows beyond scalars: a page that groups the charts of precision, and histograms over modules.

Scalars themselves go through the Trainer's and accelerate's own trackers, so that every tracker gets them.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy

from hf_amp.events import AmpEvent, Cause, EventKind
from hf_amp.monitoring.metrics import BY_MODULE, LOG_PREFIX
from hf_amp.patch_log import PatchLog

_CHARTS: Mapping[str, tuple[str, ...]] = {
    "loss scale": ("scale",),
    "scale volatility (bits)": ("scale_volatility_bits",),
    "skipped steps by cause": tuple(f"skipped_steps_{cause.value.lower()}" for cause in Cause),
    "headroom (bits)": ("headroom_bits",),
    "underflow fraction": ("underflow_fraction",),
    "gradients": ("grad_norm", "grad_amax"),
    "non-finite gradient elements": ("inf_elements", "nan_elements"),
    "precision": ("precision_changes", "modules_in_fp32"),
    "time in each precision (s)": ("fp16_seconds", "bf16_seconds", "fp32_seconds"),
    "step time (s)": ("step_seconds",),
}  # fmt: skip

_log = logging.getLogger("hf_amp")


class Writer(Protocol):
    """The part of `torch.utils.tensorboard.SummaryWriter` that is called here."""

    def add_custom_scalars(self, layout: dict[str, Any]) -> None: ...

    def add_histogram(self, tag: str, values: Any, global_step: int) -> None: ...


class TensorBoardSink:
    """Groups the charts of precision on TensorBoard's "Custom Scalars" page, and adds histograms over modules.

    Where `writer` cannot write, as on a full disk, charts are lost, its tracker's own too, and a warning says so once: a
    tracker would end the run. What cannot be written at the start, before there is a sink, is an error as ever.

    Args:
        writer: a tracker's own. It gets the layout at once.
        changes: what `writer` is changed through, so that `detach` takes it back.
        prefix: what the tracker puts before our names; the Trainer puts "train/".
    """

    def __init__(self, writer: Writer, changes: PatchLog, prefix: str = "") -> None:
        self._writer = writer
        self._prefix = prefix + LOG_PREFIX
        charts = {
            title: ["Multiline", [f"^{self._prefix}{name}$" for name in names]]
            for title, names in _CHARTS.items()
        }
        _lose_what_cannot_be_written(writer, changes)
        writer.add_custom_scalars({"hf_amp": charts})

    def write(self, event: AmpEvent) -> None:
        """Writes a histogram for every figure by module that a metrics event has; finite values only."""
        if event.kind is not EventKind.METRICS:
            return
        for metric in BY_MODULE:
            values = event.figures.get(metric.name, {}).values()
            finite = numpy.array([value for value in values if math.isfinite(value)])
            if finite.size:
                self._writer.add_histogram(self._prefix + metric.name, finite, event.step)


def _lose_what_cannot_be_written(writer: Writer, changes: PatchLog) -> None:
    reported = False

    def lossy(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def call_or_lose(*args: Any, **kwargs: Any) -> Any:
            nonlocal reported
            try:
                return call(*args, **kwargs)
            except OSError as error:  # of a thread of TensorBoard's too, which every later call raises again
                if not reported:
                    _log.warning("TensorBoard: charts are lost from here on (%s)", error)
                reported = True

        return call_or_lose

    for name in dir(writer):
        if name.startswith("add_") or name in ("flush", "close"):
            changes.set_attribute(writer, name, lossy(getattr(writer, name)))
