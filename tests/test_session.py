"""One session: what it tells of the steps that a scaler decides."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_amp import AdvancedGradScaler, AmpSession, Cause, EventKind, MixedPrecisionConfig, PrecisionMode
from hf_amp.device import Hardware, probe
from hf_amp.events import EVENTS_KEPT
from hf_amp.monitoring.metrics import NAMES
from tests.reference import OverflowInBackward


class Run:
    """One weight under a session."""

    def __init__(self, **options: Any) -> None:
        config = MixedPrecisionConfig(**options)
        self.scaler = AdvancedGradScaler(config, "cpu")
        self.session = AmpSession(config, self.scaler, PrecisionMode.MIXED, probe("cpu"))
        self.model = nn.Linear(1, 1, bias=False)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)

    def step(self, loss: str = "finite") -> None:
        self.optimizer.zero_grad()
        value = self.model(torch.ones(1, 1)).sum()
        if loss == "overflow":
            value = OverflowInBackward.apply(value)
        elif loss == "nan":
            value = value * torch.nan
        self.scaler.scale(value).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def kinds(self) -> list[EventKind]:
        return [event.kind for event in self.session.events]


def test_floor_is_told_once_until_a_step_applies() -> None:
    """At the floor and still overflowing is one event, however long it lasts, and one more after a recovery."""
    run = Run(init_scale=2.0, min_scale=1.0)
    for kind in ["overflow"] * 5 + ["finite"] + ["overflow"] * 3:
        run.step(kind)
    floors = [event for event in run.session.events if event.kind is EventKind.SCALE_AT_FLOOR]
    assert [event.step for event in floors] == [2, 7]
    assert "BF16 or FP32" in floors[0].message


def test_a_floor_above_the_scale_that_fits_is_to_be_lowered() -> None:
    """A loss so large that it needs a scale below `min_scale`: the floor is the cause, and the message says so."""

    class LargeLoss(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).square().mean() * 2e9

    model = LargeLoss(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    session = AmpSession.for_model(model, optimizer, init_scale=2.0, min_scale=1.0)
    for _ in range(3):
        session.scaler.scale(model(torch.ones(2, 8))).backward()
        session.scaler.step(optimizer)
        session.scaler.update()
        optimizer.zero_grad()
    (floor,) = (event for event in session.events if event.kind is EventKind.SCALE_AT_FLOOR)
    assert (floor.step, floor.cause) == (2, Cause.SCALE)
    assert "lower min_scale" in floor.message


def test_non_finite_losses_at_the_floor_do_not_blame_the_floor() -> None:
    """A NaN loss is never the scale's fault, at the floor neither."""
    run = Run(init_scale=1.0, min_scale=1.0)
    run.step("nan")
    assert run.kinds() == [EventKind.STEP_SKIPPED]
    assert run.session.events[0].cause is Cause.UNKNOWN


def test_every_skip_is_one_event_with_cause_before_and_after() -> None:
    """Skips are told in order, with the scale before and after; applied steps are not events."""
    run = Run(init_scale=8.0)
    for kind in ("finite", "overflow", "finite", "overflow"):
        run.step(kind)
    reported = [(e.step, e.cause, e.before, e.after) for e in run.session.events]
    assert reported == [(2, Cause.SCALE, 8.0, 4.0), (4, Cause.SCALE, 4.0, 2.0)]
    figures = run.session.metrics()
    assert figures["skipped_steps_scale"] == 2
    assert figures["skip_rate"] == 0.5
    assert set(figures) <= NAMES


def test_weights_are_named_when_the_model_is_known() -> None:
    """A NaN parameter is the cause WEIGHTS, with its qualified name."""
    run = Run()
    run.session.register_model(run.model)
    with torch.no_grad():
        run.model.weight.fill_(torch.nan)
    run.step("nan")
    event = run.session.events[0]
    assert event.cause is Cause.WEIGHTS
    assert "inf or NaN was in 1 parameter (weight) before this step" in event.message


def test_the_session_knows_the_devices_that_train() -> None:
    """Those that living models are on, a split one on several; an offloaded one says nothing. Tensors without data."""
    config, gpu = MixedPrecisionConfig(), Hardware("cuda", "H100", "native", "native")
    session = AmpSession(config, AdvancedGradScaler(config, "cpu"), PrecisionMode.MIXED, gpu)
    assert session._fallback.runner.devices() == {torch.device("cuda")}
    with FakeTensorMode():
        split = nn.ParameterList(torch.empty(1, device=device) for device in ("cuda:1", "cuda:2", "cpu"))
        session.register_model(split)
        assert session._fallback.runner.devices() == {torch.device("cuda:1"), torch.device("cuda:2")}
        del split
        offloaded = nn.ParameterList([torch.empty(1)])
        session.register_model(offloaded)
        assert session._fallback.runner.devices() == {torch.device("cuda")}
        third = nn.ParameterList([torch.empty(1, device="cuda:3")])
        session.register_model(third)
    assert session._fallback.runner.devices() == {torch.device("cuda:3")}
    assert "memory_bytes" in session.metrics()


def test_step_numbers_go_on_in_a_resumed_run() -> None:
    """After begin_at(100) the next step is the 101st, whatever the scaler has counted before."""
    run = Run()
    run.step()
    run.session.begin_at(100)
    run.step("overflow")
    assert run.session.events[0].step == 101


def test_events_are_bounded() -> None:
    """A session keeps the newest 10,000 events."""
    run = Run()
    for _ in range(EVENTS_KEPT + 5):
        run.session.note(EventKind.TRAINING_STARTED, "again")
    assert len(run.session.events) == EVENTS_KEPT


def test_detached_session_records_nothing_more() -> None:
    """After detach the scaler goes on without it; detaching again does nothing."""
    run = Run()
    with run.session:
        run.step("overflow")
    run.session.detach()
    run.step("overflow")
    assert run.kinds() == [EventKind.STEP_SKIPPED, EventKind.TRAINING_ENDED, EventKind.DETACHED]


def test_a_session_shows_what_runs_and_how_far() -> None:
    """In a notebook: which run, in what precision on what, and the newest step."""
    run = Run()
    run.step()
    assert repr(run.session) == f"<AmpSession {run.session.run_id}: {run.session.describe()}, step 1>"


def test_a_verdict_while_it_runs_knows_the_newest_step() -> None:
    """Skips are over when steps were applied after them, also where no event says so."""
    run = Run()
    for kind in ["finite"] * 30 + ["nan"] * 6 + ["finite"] * 10:
        run.step(kind)
    assert run.session.verdict().startswith("Training, but with many skips: 6 of 46 steps")
