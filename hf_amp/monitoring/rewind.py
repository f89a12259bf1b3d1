"""Which checkpoints are good, when the loss spikes, and when a run goes back: `on_stalled="rewind"`.

Going back makes skipped steps of those since the checkpoint: model, optimizer, LR schedule, scaler, counters and random state
are what it holds, the step number and the data go on. That is what editing `global_step` in a Trainer's checkpoint and resuming
from it does, to the last bit, and what Megatron-LM's `--iterations-to-skip` does. The random state is that of the checkpoint when
the first batch afterwards is run. Best metrics, callbacks and what is in no checkpoint stay as they are.
Source of the remedy: Chowdhery et al., "PaLM" (2022), section 5.1, where a restart from some 100 steps before a spike, without the
batches up to its end, was enough. `session.events` has `checkpoint_good`, `loss_spike`, `rewound` and `not_rewound`.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_amp.config import MixedPrecisionConfig, is_real
from hf_amp.device import RandomState, devices_of
from hf_amp.events import AmpEvent, EventKind, StepOutcome
from hf_amp.serialization import NotNegative, parse
from hf_amp.statistics import is_distributed, to_device
from hf_amp.tree import map_tensors

GOOD_FILE = "amp_good.json"
"""In the folder of a checkpoint: it is good."""
LOSS = "loss"
"""What the loss is called among what comes with a step's one sync."""

_log = logging.getLogger("hf_amp")


@dataclass
class RollingMean:
    """Exponential mean and variance with the mean age of a window of 100 values, so that a checkpoint holds two numbers of it.

    Source of the window: LLM Foundry's `KillLossSpike`; of the recursion: Finch, "Incremental calculation of weighted mean and
    variance" (2009).
    """

    mean: float = 0.0
    variance: NotNegative = 0.0

    WINDOW = 100

    def deviations(self, value: float) -> float:
        """How many standard deviations `value` is above the mean; 0 where nothing has varied."""
        return (value - self.mean) / math.sqrt(self.variance) if self.variance else 0.0

    def add(self, value: float, count: int) -> None:
        """Takes a finite value, the `count`-th, into account."""
        distance, weight = value - self.mean, max(1 / count, 2 / (self.WINDOW + 1))
        self.mean += weight * distance
        self.variance = (1 - weight) * (self.variance + weight * distance * distance)


@dataclass
class LossSpikes:
    """Whether a loss is a spike: at least 7 standard deviations above the mean of the newest 100, and its logarithm 4.

    Source of the 7: the "spike score" of OLMo 2 (arXiv:2501.00656), the share of values at least seven standard deviations from a
    rolling average of the last 1,000; OLMo-core's `StabilityMonitorCallback` has 6, of the last 128. The logarithm, which a loss
    that is not positive has not, keeps small losses with heavy tails from false alarms. `tests/benchmarks/test_loss_spikes.py`
    compares rules.

    Attributes:
        count: losses so far.
        plain: of the losses.
        log: of their logarithms.
    """

    count: int = 0
    plain: RollingMean = field(default_factory=RollingMean)
    log: RollingMean = field(default_factory=RollingMean)

    DEVIATIONS, LOG_DEVIATIONS = 7.0, 4.0
    FIRST = 100
    """Losses before which nothing is called a spike. Source: Megatron-LM's check for spiky losses, and LLM Foundry's."""

    def add(self, loss: float) -> float:
        """Takes a finite loss into account.

        Returns:
            How many standard deviations above the mean of those before it a spike is; 0 for any other loss.
        """
        logarithm = math.log(loss) if loss > 0 else None
        above = self.plain.deviations(loss) if self.count >= self.FIRST else 0.0
        is_spike = above >= self.DEVIATIONS
        self.count += 1
        self.plain.add(loss, self.count)
        if logarithm is not None:
            is_spike &= self.log.deviations(logarithm) >= self.LOG_DEVIATIONS
            self.log.add(logarithm, self.count)
        return above if is_spike else 0.0


@dataclass
class Checkpoint:
    """One that was written.

    Attributes:
        place: its folder, or a `Snapshot`.
        step: optimizer steps before it.
        clean_steps: after it.
    """

    place: Any
    step: int
    clean_steps: int = 0

    @property
    def is_there(self) -> bool:
        """Whether it can be loaded, as far as that can be seen."""
        return not isinstance(self.place, Path) or self.place.is_dir()

    def mark(self) -> None:
        """Writes into its folder that it is good. The folder's time stays, by which a Trainer sorts checkpoints."""
        if not isinstance(self.place, Path):
            return
        try:
            before = self.place.stat()
            unfinished = self.place / f".{GOOD_FILE}.{os.getpid()}"
            unfinished.write_text(json.dumps({"step": self.step, "clean_steps": self.clean_steps}), encoding="utf-8")
            unfinished.replace(self.place / GOOD_FILE)  # several ranks write the same
            os.utime(self.place, ns=(before.st_atime_ns, before.st_mtime_ns))
        except OSError as error:
            _log.warning("%s is good, but cannot be marked so (%s)", self.place, error)


class Rewinder:
    """Follows the steps after every checkpoint, and says when to go back.

    Args:
        config: options.

    Attributes:
        rewinds: how often the run has gone back.
        good: the newest good checkpoint; None where none is known.
        candidates: those that may become good, the oldest first.
        fault: why the newest step calls for going back; "" where it does not.
    """

    def __init__(self, config: MixedPrecisionConfig) -> None:
        self._config = config
        self.rewinds = 0
        self.good: Checkpoint | None = None
        self.candidates: list[Checkpoint] = []
        self.fault = ""
        self.spikes = LossSpikes()
        self._was_stalled = False
        self._losses: Tensor | None = None

    @property
    def watches(self) -> bool:
        """Whether there is anything to follow."""
        return self._config.loss_spikes or self.candidates != []

    def note(self, loss: Tensor, first: bool) -> None:
        """A loss that goes into backward, of any shape; `first`: of a step. No GPU-CPU sync."""
        total = loss.detach().float().sum()
        known = None if first else self._losses
        self._losses = total if known is None else known + to_device(total, known.device)

    def collect(self, record: Any, optimizer: Any) -> Mapping[str, Tensor]:
        """A step hook of the scaler: the step's losses, added up, mean over the ranks. One small all-reduce; no GPU-CPU sync."""
        loss, self._losses = self._losses, None
        if loss is None:
            return {}
        loss = to_device(loss, record.device)
        if is_distributed() and record.agrees:
            dist.all_reduce(loss)
            loss = loss / dist.get_world_size()
        return {LOSS: loss}

    def after_step(self, outcome: StepOutcome, step: int, stalled: bool) -> list[AmpEvent]:
        """One step, as all ranks know it; what it shows of the checkpoints before it, and of the loss."""
        events = []
        loss = outcome.extras.get(LOSS, math.nan) if outcome.applied else math.nan
        above = self.spikes.add(loss) if math.isfinite(loss) else 0.0
        if above:
            fault = f"the loss of step {step}, {loss:.4g}, is {above:.1f} standard deviations above its mean before"
            message = f"{fault}: look at that step's batch."
            events.append(AmpEvent(step, EventKind.LOSS_SPIKE, message=message, figures={LOSS: loss}))
        else:
            fault = "the run is stalled" if stalled and not self._was_stalled else ""
        self._was_stalled = stalled
        if fault:
            self.fault = fault
            self.candidates.clear()
        learned = outcome.has_gradients and not outcome.zero_gradients
        if outcome.applied and learned and outcome.loss_finite is not False:
            for checkpoint in self.candidates:
                checkpoint.clean_steps += 1
        while self.candidates and self.candidates[0].clean_steps >= self._config.good_after:
            checkpoint = self.candidates.pop(0)
            if checkpoint.is_there:
                events.append(self._is_good(checkpoint, step))
        return events

    def _is_good(self, checkpoint: Checkpoint, step: int) -> AmpEvent:
        checkpoint.mark()
        self.good = checkpoint
        message = f"{checkpoint.place} is a good checkpoint: {checkpoint.clean_steps} clean steps came after it."
        return AmpEvent(step, EventKind.CHECKPOINT_GOOD, message=message)

    def written(self, place: Any, step: int) -> None:
        """A checkpoint was written after so many optimizer steps, or a run goes on from it: it may become good."""
        if isinstance(place, Path):
            (place / GOOD_FILE).unlink(missing_ok=True)  # of what it has replaced
            self.candidates = [each for each in self.candidates if each.is_there and each.place != place]
            if self.good is not None and self.good.place == place:
                self.good = None
        self.candidates.append(Checkpoint(place, step))

    def find(self, folder: Path, step: int) -> None:
        """A run goes on after `step` optimizer steps from a checkpoint in `folder`: looks which are good there."""
        marked = [Checkpoint(path.parent, _step_in(path)) for path in folder.glob(f"checkpoint-*/{GOOD_FILE}")]
        known = [each for each in marked if 0 <= each.step <= step]
        self.good = max(known, key=lambda each: each.step, default=None)
        newest = folder / f"checkpoint-{step}"
        if step and newest.is_dir() and not (newest / GOOD_FILE).is_file():
            self.written(newest, step)

    def kept(self) -> list[Path]:
        """Checkpoints that rotation must leave: the newest good one, and, where a run goes back, the next to become good."""
        next_one = [each for each in self.candidates if each.is_there][: self._config.on_stalled == "rewind"]
        return [each.place for each in (*filter(None, [self.good]), *next_one) if isinstance(each.place, Path)]

    def go_back(self, load: Callable[[Any], None], step: int) -> AmpEvent:
        """Has `load` load the newest good checkpoint, where there is one and `max_rewinds` allows; what became of it.

        Args:
            step: optimizer steps so far, which stay as many.
        """
        (fault, self.fault), why_not, rewinds = (self.fault, ""), self._refusal(), self.rewinds + 1
        if why_not or self.good is None:
            message = f"{fault}, and hf_amp cannot go back to a checkpoint: {why_not}."
            return AmpEvent(step, EventKind.NOT_REWOUND, message=message)
        good, left_out = self.good, step - self.good.step
        load(good.place)
        self.rewinds = rewinds
        message = (
            f"{fault}: hf_amp has loaded {good.place}, and the run is what it was after step {good.step:,}. It goes on with the next "
            f"batch; what the {left_out:,} steps since have learned is lost. This is rewind {rewinds} of at most "
            f"{self._config.max_rewinds} (max_rewinds). If it comes again, look at these batches or lower the learning rate."
        )
        figures = {"left_out_steps": left_out, "rewinds": rewinds, "checkpoint": str(good.place)}
        return AmpEvent(step, EventKind.REWOUND, before=step, after=good.step, message=message, figures=figures)

    def _refusal(self) -> str:
        if self._config.on_stalled != "rewind":
            return "on_stalled is not 'rewind'"
        if self.rewinds >= self._config.max_rewinds:
            times = "once" if self.rewinds == 1 else f"{self.rewinds} times"
            return f"it has gone back {times}, as often as max_rewinds allows; lower the learning rate, or look for a fault in the data"
        if self.good is None:
            return f"none is good yet, which takes {self._config.good_after} clean steps after it; save more often, or lower good_after"
        return "" if self.good.is_there else f"{self.good.place} is not there any more"

    def metrics(self) -> dict[str, float]:
        """How often the run has gone back, where it may."""
        return {"rewinds": float(self.rewinds)} if self._config.on_stalled == "rewind" else {}

    def state_dict(self) -> dict[str, Any]:
        """Plain data. Which checkpoints are good stands beside them."""
        return {"rewinds": self.rewinds, "spikes": asdict(self.spikes)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from `state_dict`.

        Raises:
            StateError: it is no such state; nothing has changed then.
        """
        saved: _Saved = parse(_Saved, state_dict, "rewind")
        self.rewinds, self.spikes = saved.rewinds, saved.spikes
        self._was_stalled, self._losses = False, None


@dataclass
class _Saved:
    rewinds: int = 0
    spikes: LossSpikes = field(default_factory=LossSpikes)


def _step_in(marker: Path) -> int:
    """The step of a good checkpoint; -1 where its mark is damaged."""
    try:
        step = json.loads(marker.read_text(encoding="utf-8"))["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return -1
    return int(step) if isinstance(step, int) and is_real(step) else -1


class Snapshot:
    """Model, optimizer, LR schedule, session and random state of a loop that writes no checkpoints, on the host.

    Copies all of it to the CPU.

    Args:
        trained: what has `state_dict` and `load_state_dict`.
        model: whose devices draw random numbers.
    """

    def __init__(self, trained: list[Any], model: torch.nn.Module) -> None:
        self._trained = trained
        self._states = [map_tensors(lambda x: x.detach().to("cpu", copy=True), each.state_dict()) for each in trained]
        self._random = RandomState.now(devices_of(model))

    def __repr__(self) -> str:
        return "the copy in memory"

    def restore(self) -> None:
        """Makes everything what it was; any number of times."""
        for each, state in zip(self._trained, self._states, strict=True):
            each.load_state_dict(map_tensors(Tensor.clone, state))
        self._random.restore()


def keep_or_go_back(session: Any, model: torch.nn.Module, *trained: Any) -> None:
    """After a step of a loop without checkpoints: goes back where it has shown a fault, and makes a copy every `good_after` steps.

    Args:
        session: an `AmpSession`.
        trained: optimizer and LR scheduler; None is passed over.
    """
    rewinder, session.on_fault = session.rewinder, None
    if rewinder.fault:
        session.go_back(Snapshot.restore)
    if not rewinder.candidates:
        rewinder.written(Snapshot([model, *filter(None, trained), session], model), session.newest_step)
