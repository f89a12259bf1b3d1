"""The batches of one optimizer step, from the first to the step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_amp.events import Cause
from hf_amp.training.batch import LossFunction, samples_in
from hf_amp.training.rewind import Rewind

RETRIES: dict[Cause, int] = {Cause.SCALE: 32, Cause.ACTIVATION: 32, Cause.UNKNOWN: 2}
"""How often a skipped step is run again with the same data, by its cause: as long as a new scale or plan may cure it.
Source of the 2 for causes that could not be shown: fairseq's AMP trainer."""


class Trained(NamedTuple):
    """What a step trains, with what.

    Attributes:
        size: batches in the window.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss_fn: LossFunction | None
    size: int


@dataclass
class Window:
    """Batches that are accumulated into one optimizer step.

    Attributes:
        batches: so far, as they were given.
        rewind: takes model and random generators back to before the first; None where no step is run again.
        retries: how often the step was run again.
        norm: of the gradients before clipping, shape []; None where nothing is clipped.
        cause: of the newest skip; None after an applied step.
    """

    rewind: Rewind | None
    batches: list[Any] = field(default_factory=list)
    retries: int = 0
    norm: Tensor | None = None
    cause: Cause | None = None

    @property
    def samples(self) -> int:
        """Rows of all batches."""
        return sum(map(samples_in, self.batches))

    def may_retry(self) -> bool:
        """Whether another run of the same data may succeed where the newest was skipped."""
        if self.rewind is None or self.cause is None:
            return False
        return self.retries < RETRIES.get(self.cause, 0)
