"""One bad row every so many steps: the run learns what it learns without these rows."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import hf_amp
from hf_amp import EventKind, MixedPrecisionConfig
from tests.each import for_each, forget_accelerators


class Regression(nn.Module):
    """Two hidden layers, with its loss inside where there are labels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        y = self.layers(x).squeeze(-1)
        return y if labels is None else (y - labels).square().mean()


class Learned(NamedTuple):
    """Where a run has got to: its loss on rows of its own, its scale, its mean underflow, and how many steps it skipped."""

    loss: float
    scale: float
    underflow: float
    skipped: int


@cache
def learned(strategy: str, bad: str, steps: int, every: int) -> Learned:
    """A run whose every `every`-th batch has a row with NaN in its "input" or its "label", or, for "left out", lacks that row."""
    forget_accelerators()
    rows = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    session = hf_amp.attach(accelerator, MixedPrecisionConfig(scaling_strategy=strategy, monitoring_interval=10))
    plain = Regression()
    model, optimizer = accelerator.prepare(plain, torch.optim.AdamW(plain.parameters(), lr=2e-3))
    underflow = []
    for step in range(1, steps + 1):
        x = torch.randn(16, 8, generator=rows)
        labels = torch.sin(x.sum(-1)) * 0.5
        if step % every == 0:
            if bad == "left out":
                x, labels = x[1:], labels[1:]
            else:
                (x if bad == "input" else labels)[0] = torch.nan
        loss = (model(x) - labels).square().mean() if bad == "label" else model(x, labels)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        underflow.append(session.metrics().get("underflow_fraction", 0.0))
    x = torch.randn(4096, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        loss = plain.float()(x, torch.sin(x.sum(-1)) * 0.5).item()
    skipped = sum(e.kind is EventKind.STEP_SKIPPED for e in session.events)
    scale = session.scaler.get_scale()
    session.detach()
    return Learned(loss, scale, sum(underflow[steps // 2 :]) / (steps - steps // 2), skipped)


@for_each("bad", ["input", "label"])
@for_each("strategy", ["DYNAMIC", "ADAPTIVE"])
def test_bad_rows_cost_their_batches_alone(strategy: str, bad: str, full_size: bool) -> None:
    """NaN in a row, also in labels of a loss that the loop makes: scale, underflow and loss are as without that row."""
    steps, every = (1500, 50) if full_size else (200, 50)
    without, with_them = learned(strategy, "left out", steps, every), learned(strategy, bad, steps, every)
    print(f"\n{strategy} {bad}: {with_them} against {without}")
    assert with_them.skipped - without.skipped == steps // every
    assert with_them.scale >= without.scale / 2
    assert with_them.underflow <= without.underflow * 1.1 + 2e-4  # two elements of 12,002
    assert with_them.loss == without.loss or with_them.loss <= without.loss * 1.01
