"""One bad row every so many steps: the run learns what it learns without these rows."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import hf_amp
from hf_amp import Cause, EventKind, MixedPrecisionConfig
from tests.each import for_each, forget_accelerators
from tests.integrations.trainers import text_rows, tiny_gpt2


class Weighted(nn.Module):
    """GPT-2 over bytes, whose rows have weights; the loss is made inside where they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_gpt2()

    def forward(self, ids: Tensor, weights: Tensor | None = None) -> Tensor:
        logits = self.model(input_ids=ids).logits[:, :-1].float()
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        by_row = losses.view(len(ids), -1).mean(1)
        return by_row if weights is None else (by_row * weights).mean()


class Learned(NamedTuple):
    """Where a run has got to: its mean loss over the last quarter (of batches that are whole in both), its scale, its mean underflow, and how many steps it skipped for
    another cause than the scale."""

    loss: float
    scale: float
    underflow: float
    skipped: int


@cache
def learned(strategy: str, bad: str, steps: int, every: int) -> Learned:
    """A run of which every `every`-th batch has a row whose weight is NaN, where the model makes the loss ("input") or the loop does
    ("label"), or, for "left out", lacks that row."""
    forget_accelerators()
    rows = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    session = hf_amp.attach(accelerator, MixedPrecisionConfig(scaling_strategy=strategy, monitoring_interval=10))
    plain, text = Weighted(), torch.tensor([row["input_ids"] for row in text_rows()])
    model, optimizer = accelerator.prepare(plain, torch.optim.AdamW(plain.parameters(), lr=2e-3))
    underflow, losses = [], []
    for step in range(1, steps + 1):
        ids, weights = text[torch.randint(len(text), (4,), generator=rows)], torch.ones(4)
        if step % every == 0:
            if bad == "left out":
                ids, weights = ids[1:], weights[1:]
            else:
                weights[0] = torch.nan
        loss = (model(ids) * weights).mean() if bad == "label" else model(ids, weights)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        underflow.append(session.metrics().get("underflow_fraction", 0.0))
        losses += [] if step % every == 0 else [loss.item()]
    newest = losses[-steps // 4 :]
    loss = sum(newest) / len(newest)
    skipped = sum(e.kind is EventKind.STEP_SKIPPED and e.cause is not Cause.SCALE for e in session.events)
    scale = session.scaler.get_scale()
    session.detach()
    return Learned(loss, scale, sum(underflow[steps // 2 :]) / (steps - steps // 2), skipped)


@for_each(
    ("strategy", "bad"), [("DYNAMIC", "input"), ("ADAPTIVE", "label"), ("ADAPTIVE", "input"), ("DYNAMIC", "label")]
)
def test_bad_rows_cost_their_batches_alone(strategy: str, bad: str, full_size: bool) -> None:
    """NaN in a row, also in a loss that the loop makes: scale, underflow and loss are as without that row."""
    if not full_size and (strategy, bad) in (("ADAPTIVE", "input"), ("DYNAMIC", "label")):
        return  # the same steps
    steps, every = (1500, 50) if full_size else (200, 50)
    without, with_them = learned(strategy, "left out", steps, every), learned(strategy, bad, steps, every)
    print(f"\n{strategy} {bad}: {with_them} against {without}")
    assert (with_them.skipped, without.skipped) == (steps // every, 0)
    assert with_them.scale >= without.scale / 2
    assert with_them.underflow <= without.underflow * 1.1 + 2e-4  # two elements of 12,002
    assert abs(with_them.loss / without.loss - 1) <= 0.01
