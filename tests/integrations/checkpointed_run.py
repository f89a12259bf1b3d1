"""A short run that saves checkpoints and can be killed in the middle of one. Run as a program, it dies by SIGKILL."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration
from torch import nn

import hf_amp
from hf_amp import AmpSession, MixedPrecisionConfig
from tests.reference import TIMINGS, OverflowInBackward, snapshot

OVERFLOWING = (1, 4, 7)
LARGE = (2,)
"""Steps whose batch takes the first layer beyond 65504."""


@dataclass
class Run:
    """A network with dropout on random data: nothing repeats unless the random state does."""

    accelerator: Accelerator
    session: AmpSession | None
    model: nn.Module
    optimizer: Any
    scheduler: Any
    period: int = 1000
    """Steps after which its overflows come again."""

    def train(self, first: int, last: int) -> None:
        """Steps `first` up to, but not, `last`."""
        for step in range(first, last):
            at = step % self.period
            loss = self.model(torch.randn(5, 4) * (1e5 if at in LARGE else 1.0)).square().mean()
            self.accelerator.backward(OverflowInBackward.apply(loss) if at in OVERFLOWING else loss)
            self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()

    def everything(self) -> tuple[list[torch.Tensor], Any]:
        """Parameters, optimizer state, and all that is saved and told of the session, but for what a clock has measured."""
        assert self.session is not None
        saved = self.session.scaler.state_dict()
        del saved["hf_amp"]["stateful"]["throughput"]
        figures = {name: value for name, value in self.session.metrics().items() if name not in TIMINGS}
        return snapshot(self.model, self.optimizer), (self.scheduler.get_last_lr(), saved, figures)


def begin(precision: str = "fp16", *, folder: str | None = None, attached: bool = True, **options: Any) -> Run:
    """A run before its first step; with `folder` its checkpoints are named by accelerate."""
    AcceleratorState._reset_state(reset_partial_state=True)  # as in a new process
    project = ProjectConfiguration(folder, automatic_checkpoint_naming=True, total_limit=1) if folder else None
    accelerator = Accelerator(mixed_precision=precision, cpu=True, project_config=project)
    session = hf_amp.attach(accelerator, MixedPrecisionConfig(**options)) if attached else None
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 20)
    return Run(accelerator, session, *accelerator.prepare(model, optimizer, scheduler))


class KilledWhileSaved:
    """An object that accelerate saves last, and that kills the process instead the second time."""

    def __init__(self) -> None:
        self.saved = 0

    def state_dict(self) -> dict[str, Any]:
        self.saved += 1
        if self.saved == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def main(folder: str, naming: str, strategy: str) -> None:
    run = begin(folder=folder if naming == "automatic" else None, scaling_strategy=strategy)
    run.accelerator.register_for_checkpointing(KilledWhileSaved())
    run.train(0, 6)
    run.accelerator.save_state(None if naming == "automatic" else folder)
    run.train(6, 8)
    run.accelerator.save_state(None if naming == "automatic" else folder)
    raise AssertionError("not killed")


if __name__ == "__main__":
    main(*sys.argv[1:])
