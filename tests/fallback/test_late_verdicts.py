"""A verdict that the device gives one, two or three steps late leads to the same as one that is there at once."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_amp import AmpSession, Cause, EventKind, MixedPrecisionConfig, PrecisionMode, statistics
from hf_amp.fallback import recorder
from hf_amp.fallback.controller import TIMED_STEPS, WARMUP_STEPS


class Model(nn.Module):
    """Batch norm, dropout, and a layer that a large `gain` drives out of FP16's range."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.dropout = nn.BatchNorm1d(8), nn.Dropout(0.2)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        large = self.first(self.dropout(self.norm(x)) * gain).float()
        return self.last(torch.tanh(large / gain)).square().mean()


def late_transfers(monkeypatch: pytest.MonkeyPatch, steps_late: int) -> list[int]:
    """Figures arrive on the host when as many further ones have been asked for; returns how many were waited for before that."""
    made: list[Any] = []
    waited: list[int] = []
    begin, end = statistics.PendingTransfer.__init__, statistics.PendingTransfer.result

    def note(transfer: Any, values: Any) -> None:
        begin(transfer, values)
        made.append(transfer)

    def is_ready(transfer: Any) -> bool:
        return len(made) - made.index(transfer) > steps_late

    def result(transfer: Any) -> dict[str, float]:
        waited.append(len(made) - 1 - made.index(transfer))
        return end(transfer)

    monkeypatch.setattr(statistics.PendingTransfer, "__init__", note)
    monkeypatch.setattr(statistics.PendingTransfer, "ready", is_ready)
    monkeypatch.setattr(statistics.PendingTransfer, "result", result)
    return waited


@dataclasses.dataclass
class Ended:
    causes: list[tuple[int, Any]]
    plan: Any
    buffers: list[Tensor]


def run(monkeypatch: pytest.MonkeyPatch, steps_late: int) -> Ended:
    """Twelve steps, of which the 4th has NaN in its batch and the 8th overflows forward."""
    with monkeypatch.context() as patch:
        waited = late_transfers(patch, steps_late)
        model = Model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        session = AmpSession.for_model(model, optimizer, scaling_strategy="PERFORMANCE_OPTIMIZED", init_scale=256.0)
        torch.manual_seed(1)
        for step in range(1, 13):
            x = torch.randn(16, 8)
            x[0, 0] = torch.nan if step == 4 else x[0, 0]
            optimizer.zero_grad()
            session.scaler.scale(model(x, 1e6 if step == 8 else 1.0)).backward()
            session.scaler.step(optimizer)
            session.scaler.update()
        session.scaler.flush()
        assert set(waited[:-1]) == {0}  # of the newest: that of the step before, when a step's work is queued behind it
        skips = [
            (e.step, e.cause.value if e.cause else None) for e in session.events if e.kind is EventKind.STEP_SKIPPED
        ]
        return Ended(skips, session.plan, [buffer.clone() for buffer in model.buffers()])


def test_late_verdicts_lead_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Causes, plan and buffers are those of verdicts on time; buffers are finite."""
    on_time = run(monkeypatch, 0)
    # The forward pass after a bad one begins before the verdict, with what that has left in the running statistics.
    assert [skip for skip in on_time.causes if skip[0] in (4, 8)] == [(4, "INPUT"), (8, "ACTIVATION")]
    assert dict(on_time.plan.modules) == {"first": PrecisionMode.FP32}
    assert all(buffer.isfinite().all() for buffer in on_time.buffers)
    for steps_late in (1, 2, 3):
        late = run(monkeypatch, steps_late)
        assert (late.causes, late.plan) == (on_time.causes, on_time.plan)
        for ours, theirs in zip(late.buffers, on_time.buffers, strict=True):
            assert torch.equal(ours, theirs)


class Amplifies(nn.Module):
    """Its gradient leaves FP16 in backward only, at any scale, and what lies before it must run in FP32 too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.gain = 1.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x))
        return self.last(x + (x - x.detach()) * self.gain).float().square().mean()


def test_a_step_that_ran_before_the_cure_of_backward_lowers_no_scale() -> None:
    """While one step is looked at the next has run in the old plan, and overflows again: its scale was not to blame."""
    model = Amplifies()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-20, fused=True)
    session = AmpSession.for_model(model, optimizer, scaling_strategy="PERFORMANCE_OPTIMIZED", init_scale=64.0)
    for step in range(1, 9):
        model.gain = 1e16 if step > 2 else 1.0
        optimizer.zero_grad()
        session.scaler.scale(model(torch.randn(16, 8))).backward()
        session.scaler.step(optimizer)
        session.scaler.update()
    session.scaler.flush()
    skips = [e for e in session.events if e.kind is EventKind.STEP_SKIPPED]
    assert {e.cause for e in skips} == {Cause.ACTIVATION}
    assert any("ran before the newest change of precision" in e.message for e in skips)
    assert [e.step for e in skips] == [3, 4, 5]
    assert len({e.after for e in skips}) == 1


def test_a_clean_step_at_a_lower_scale_says_nothing_of_the_one_given_back() -> None:
    """The step after the last skip was made at 2^-16, while the verdict on that was late: the scale stays where it was put."""
    model = Amplifies()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-20, fused=True)
    session = AmpSession.for_model(model, optimizer, scaling_strategy="PERFORMANCE_OPTIMIZED", init_scale=64.0)
    scales = []
    for step in range(1, 8):
        model.gain = 1e16 if step in (3, 4, 5) else 1.0
        optimizer.zero_grad()
        scales.append(session.scaler.get_scale())
        session.scaler.scale(model(torch.randn(16, 8))).backward()
        session.scaler.step(optimizer)
        session.scaler.update()
    skips = [e for e in session.events if e.kind is EventKind.STEP_SKIPPED]
    assert [e.step for e in skips] == [3, 4, 5]
    assert scales[5] == skips[2].before * 2**-8
    assert session.scaler.get_scale() == skips[2].after
    session.scaler.flush()
    assert session.scaler.get_scale() > skips[2].after  # step 7 was clean at that


def test_a_loss_that_is_not_finite_lowers_no_scale() -> None:
    """The loop makes it, so that no replay confirms it; the device, which lowers the scale of the next step meanwhile, is put right."""
    model = Amplifies()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    session = AmpSession.for_model(model, optimizer, scaling_strategy="PERFORMANCE_OPTIMIZED", init_scale=64.0)
    for step in range(8):
        optimizer.zero_grad()
        loss = model(torch.randn(16, 8))
        session.scaler.scale(loss + torch.log((loss - loss).abs()) if step in (3, 4, 5) else loss).backward()
        session.scaler.step(optimizer)
        session.scaler.update()
    session.scaler.flush()
    skips = [e for e in session.events if e.kind is EventKind.STEP_SKIPPED]
    assert [e.cause for e in skips] == [Cause.LOSS] * 3
    assert len({e.after for e in skips}) == 1
    assert session.scaler.get_scale() >= 64.0


def test_a_step_is_timed_in_the_precision_that_it_was_queued_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A late verdict on the last step of one candidate is no time of the next."""
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    options = {
        "precision_mode": "DYNAMIC",
        "scaling_strategy": "PERFORMANCE_OPTIMIZED",
        "init_scale": 1.0,
        "emulate": False,
    }
    session = AmpSession.for_model(model, optimizer, MixedPrecisionConfig(**options))
    noted: list[tuple[PrecisionMode, PrecisionMode]] = []
    tuner, ran_in = session._fallback._autotuner, list[PrecisionMode]()
    note = tuner.note
    monkeypatch.setattr(tuner, "note", lambda seconds: (noted.append((tuner.running, ran_in[-2])), note(seconds)))
    for _ in range(2 * (WARMUP_STEPS + TIMED_STEPS)):
        ran_in.append(session.plan.default)
        optimizer.zero_grad()
        session.scaler.scale(model(torch.randn(16, 8))).backward()
        session.scaler.step(optimizer)
        session.scaler.update()
    assert noted
    assert all(running is queued for running, queued in noted)
    assert len({running for running, _ in noted}) > 1


def test_batches_are_kept_until_their_step_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one step where the verdict is on time, of two where it is late, and of one no more bytes than the bound."""
    for strategy, steps in (("DYNAMIC", 1), ("PERFORMANCE_OPTIMIZED", 2)):
        model = Model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        session = AmpSession.for_model(model, optimizer, scaling_strategy=strategy)
        kept = session._fallback.recorder
        most = 0
        for _ in range(5):
            for _ in range(3):
                loss = model(torch.randn(16, 8))
                most = max(most, sum(len(its.calls) for its in kept._by_step.values()))
                session.scaler.scale(loss).backward()
            session.scaler.step(optimizer)
            session.scaler.update()
            optimizer.zero_grad()
        assert most == 3 * steps
    monkeypatch.setattr(recorder, "KEPT_BYTES", 2 * 16 * 8 * 4)
    for _ in range(4):
        session.scaler.scale(model(torch.randn(16, 8))).backward()
    (newest,) = [its for its in kept._by_step.values() if its.calls][-1:]
    assert len(newest.calls) == 2
    assert newest.has_let_go
