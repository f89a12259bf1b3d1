"""Runs that go back to a good checkpoint equal manual resumes, to the last bit; which checkpoints are good, and kept."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

import hf_amp
from hf_amp import (
    AdvancedMixedPrecisionManager,
    AmpSession,
    ConfigError,
    EventKind,
    MixedPrecisionCallback,
    MixedPrecisionConfig,
)
from hf_amp.monitoring.rewind import GOOD_FILE
from tests.each import for_each, forget_accelerators
from tests.forking import told_by_ranks
from tests.integrations.launching import launch
from tests.integrations.rewinding import (
    Case,
    Noisy,
    case_number,
    compare,
    differences,
    resumed_run,
    rewound_run,
    rows_for,
    state_of,
    trainer_of,
)

NUMBER, IN_CI = 50, (0, 2, 4)
"""FP32 and NaN in a weight; FP16 and NaN batches; a spike in PERFORMANCE_OPTIMIZED."""


@pytest.mark.parametrize("number", range(NUMBER))
def test_going_back_equals_a_manual_resume(tmp_path: Path, number: int, full_size: bool) -> None:
    """Model, optimizer, schedule, scaler, policy, counters, random state, step, epoch and losses at the end of the run."""
    if not full_size and number not in IN_CI:
        pytest.skip("with --full-size")
    assert compare(case_number(number), tmp_path) == []


def test_a_run_that_went_back_resumes_exactly(tmp_path: Path) -> None:
    """Killed after it, and resumed from its next checkpoint: it ends as the run that was not."""
    case = dataclasses.replace(case_number(3), at=9, steps=20)
    trainer, callback = rewound_run(case, tmp_path / "whole")
    newest = tmp_path / "whole" / "checkpoint-15"
    assert differences(state_of(trainer, callback), resumed_run(case, newest, tmp_path / "again")) == []


def test_two_ranks(tmp_path: Path, full_size: bool) -> None:
    """The same on each of two ranks over gloo, with a spike that is in the mean of both."""
    numbers = [str(n) for n in (range(0, NUMBER, 5) if full_size else (7,))]
    if full_size:
        program = ["-m", "tests.integrations.rewinding", str(tmp_path), *numbers]
        printed = launch("cpu_2_processes.yaml", *program)
        ranks = json.loads(printed[printed.index("[{") :].splitlines()[0])
    else:
        ranks = told_by_ranks("tests.integrations.rewinding", str(tmp_path), *numbers, ACCELERATE_USE_CPU="true")
    assert ranks == [{number: [] for number in numbers}] * 2


# ---- events, limits ------------------------------------------------------------------------------------------

STALLS = Case("stall", at=10, steps=30, rows=128, options={"on_stalled": "rewind", "good_after": 4, "patience": 3})


def events_of(callback: MixedPrecisionCallback, *kinds: EventKind) -> list[Any]:
    return [event for event in callback.session.events if event.kind in kinds]


def test_it_reaches_log_metrics_and_session(tmp_path: Path) -> None:
    """One event: in the JSON-lines log, in `log_history` by name and number, in the session."""
    trainer, callback = rewound_run(STALLS, tmp_path)
    (rewound,) = events_of(callback, EventKind.REWOUND)
    assert (rewound.step, rewound.before, rewound.after) == (12, 12, 3)
    assert rewound.figures == {"left_out_steps": 9, "rewinds": 1, "checkpoint": str(tmp_path / "checkpoint-3")}
    logged = [json.loads(line) for line in (tmp_path / "amp_events.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if line["event"] == "rewound"] == [12]
    assert callback.session.metrics()["rewinds"] == 1
    entry = next(e for e in trainer.state.log_history if "rewound" in e.get("amp_incident", ""))
    assert (entry["step"], entry["amp/rewinds"]) == (12, 1)
    assert "Training, after going back once" in callback.session.verdict()
    assert trainer.state.global_step == callback.session.newest_step == 30


@for_each(
    ("options", "why"),
    [
        (
            {"max_rewinds": 1, "on_stalled": "rewind"},
            "it has gone back once, as often as max_rewinds allows; lower the learning rate",
        ),
        ({"good_after": 100}, "none is good yet, which takes 100 clean steps after it; save more often"),
    ],
)
def test_it_stops_where_it_cannot_go_back(
    tmp_path_factory: pytest.TempPathFactory, options: dict[str, Any], why: str
) -> None:
    """A stalled run that has gone back as often as it may, or has nowhere to go back to, stops, and says why."""
    case = dataclasses.replace(STALLS, options={**STALLS.options, **options}, steps=40, rows=13 * 4)
    trainer, callback = rewound_run(case, tmp_path_factory.mktemp("run"))  # the bad rows come again in the next epoch
    (refused,) = events_of(callback, EventKind.NOT_REWOUND)
    assert why in refused.message
    (stopped,) = events_of(callback, EventKind.TRAINING_STOPPED)
    assert stopped.step == refused.step == trainer.state.global_step < 40


def test_a_spike_is_reported_and_stops_only_where_asked(tmp_path_factory: pytest.TempPathFactory) -> None:
    """By default it is an event, and the run goes on."""
    for fate, last in (("report", 112), ("stop", 107)):
        options = {"loss_spikes": True, "on_stalled": fate}
        trainer, callback = rewound_run(
            Case("spike", 107, 112, 4 * 112, options=options), tmp_path_factory.mktemp(fate)
        )
        assert [e.step for e in events_of(callback, EventKind.LOSS_SPIKE)] == [107]
        assert trainer.state.global_step == last


@for_each("wrong", [{"save_strategy": "no"}, {"save_only_model": True}])
def test_what_saves_nothing_to_go_back_to_is_refused(
    tmp_path_factory: pytest.TempPathFactory, wrong: dict[str, Any]
) -> None:
    """Before the first step, with what to set."""
    with pytest.raises(ConfigError, match="there is no checkpoint to go back to; set save_"):
        rewound_run(dataclasses.replace(STALLS, arguments=wrong), tmp_path_factory.mktemp("run"))


def test_loops_without_checkpoints_are_refused() -> None:
    """`AmpSession.for_model` knows of none."""
    model = nn.Linear(2, 1)
    with pytest.raises(ConfigError, match="hf_amp knows no checkpoints there"):
        AmpSession.for_model(model, torch.optim.SGD(model.parameters()), on_stalled="rewind")


# ---- good checkpoints ----------------------------------------------------------------------------------------


def folders(path: Path) -> dict[str, bool]:
    """Checkpoint → whether it is marked good."""
    return {
        p.name: (p / GOOD_FILE).is_file() for p in sorted(path.glob("*checkpoint*"), key=lambda p: int(p.name[11:]))
    }


@for_each(
    ("fate", "good_after", "kept"),
    [
        ("report", 2, {"checkpoint-15": True, "checkpoint-18": False}),
        ("rewind", 7, {"checkpoint-9": True, "checkpoint-15": False, "checkpoint-18": False}),
    ],
)
def test_rotation_keeps_the_newest_good_one(
    tmp_path_factory: pytest.TempPathFactory, fate: str, good_after: int, kept: dict[str, bool]
) -> None:
    """With room for one: the newest, and the newest that is good; where the run may go back, the next to become good too."""
    folder = tmp_path_factory.mktemp("run")
    case = Case("none", 0, 18, 128, {"save_total_limit": 1}, {"on_stalled": fate, "good_after": good_after})
    _, callback = rewound_run(case, folder)
    assert folders(folder) == kept
    assert callback.session.rewinder.good.place.name == next(name for name, is_good in kept.items() if is_good)


def test_a_killed_save_leaves_the_good_one(tmp_path: Path) -> None:
    """Killed while the good one had another name: it has its own again, and is known to be good, when training goes on."""
    case = Case("none", 0, 12, 128, options={"good_after": 4})
    rewound_run(case, tmp_path)
    (tmp_path / "checkpoint-6").rename(tmp_path / ".checkpoint-6.kept")
    for good in ("checkpoint-3", "checkpoint-9"):
        (tmp_path / good / GOOD_FILE).unlink(missing_ok=True)
    callback = MixedPrecisionCallback(case.options)
    trainer_of(dataclasses.replace(case, steps=13), tmp_path, callback).train(resume_from_checkpoint=True)
    assert callback.session.rewinder.good.place == tmp_path / "checkpoint-6"
    assert not list(tmp_path.glob(".checkpoint*"))


# ---- Accelerate and the manager -----------------------------------------------------------------------------


def loop(
    folder: Path, precision: str, case: Case, resume: tuple[int, int] | None = None
) -> tuple[AmpSession, dict[str, Any]]:
    """A loop with `save_state` every third step; or one that skips to a batch and loads the state of a step there."""
    forget_accelerators()
    torch.manual_seed(5)
    accelerator = Accelerator(mixed_precision=precision, cpu=True)
    options = {"on_stalled": "rewind", "good_after": 4, "init_scale": 1024.0, "loss_spikes": True}
    session = hf_amp.attach(accelerator, options)
    data = DataLoader(
        rows_for(case),
        batch_size=4,
        collate_fn=lambda rows: {k: torch.tensor([row[k] for row in rows]) for k in rows[0]},
    )
    model = Noisy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    model, optimizer, data, schedule = accelerator.prepare(model, optimizer, data, schedule)
    begin, batches = 1, iter(data)
    if resume is not None:
        begin = resume[0] + 1
        batches = iter(accelerator.skip_first_batches(data, resume[0]))
        batches = itertools.chain([next(batches)], batches)
        accelerator.load_state(str(folder / f"state-{resume[1]}"))
    for step, batch in enumerate(batches, begin):
        if step == case.at and case.fault == "weights":
            with torch.no_grad():
                model.hidden.weight[0, 0] = torch.nan
        accelerator.backward(model(**batch)["loss"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 3 == 0 and step > case.at - 12 and resume is None:
            accelerator.save_state(str(folder / f"state-{step}"))
    scaler = session.scaler.state_dict()
    scaler.get("hf_amp", {}).get("stateful", {}).clear()
    state = {
        "model": dict(model.state_dict()), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
        "scaler": scaler, "torch": torch.get_rng_state(),
    }  # fmt: skip
    return session, state


@for_each(
    ("precision", "case", "after"),
    [
        ("fp16", Case("weights", 11, 20, 80), 6),
        ("no", Case("weights", 11, 20, 80), 6),
        ("bf16", Case("spike", 107, 116, 4 * 116), 102),  # its step was applied, and still the schedule does not move
    ],
)
def test_an_accelerate_loop_goes_back(
    tmp_path_factory: pytest.TempPathFactory, precision: str, case: Case, after: int
) -> None:
    """By itself, in `optimizer.step`: as a loop that skips to the batch after the fault and loads the state."""
    folder = tmp_path_factory.mktemp("run")
    session, ours = loop(folder, precision, case)
    (rewound,) = [e for e in session.events if e.kind is EventKind.REWOUND]
    assert (rewound.before, rewound.after) == (case.at, after)
    assert (folder / f"state-{after}" / GOOD_FILE).is_file()
    _, manual = loop(folder, precision, case, resume=(case.at, after))
    assert differences(ours, manual) == []


class PoisonedAt(Noisy):
    """One of whose weights becomes NaN in a forward pass, once."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.calls = at, 0

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        self.calls += 1
        if self.calls == self.at:
            with torch.no_grad():
                self.hidden.weight[0, 0] = torch.nan
        return super().forward(x, labels)


def managed(batches: list[Any], poisoned_at: int = 0) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A manager's epoch over the batches: its session, what it returns, what is trained."""
    torch.manual_seed(5)
    model = PoisonedAt(poisoned_at)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    config = MixedPrecisionConfig(on_stalled="rewind", good_after=4, init_scale=1024.0)
    with AdvancedMixedPrecisionManager(config, loss_fn=None) as manager:
        result = manager.train_epoch(batches, model, optimizer, scheduler=schedule, progress=False)
        scaler = manager.trainer.scaler.state_dict()
        scaler["hf_amp"].pop("stateful")
        state = {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
                 "scaler": scaler, "torch": torch.get_rng_state()}  # fmt: skip
        return manager.trainer.session, result, state


def test_the_manager_goes_back() -> None:
    """From its own copy: as an epoch without the batches in between."""
    rows = rows_for(Case("none", 0, 20, 80))
    batches = [{k: torch.tensor([row[k] for row in rows[i : i + 4]]) for k in ("x", "labels")} for i in range(0, 80, 4)]
    session, result, ours = managed(batches, poisoned_at=12)
    (rewound,) = [e for e in session.events if e.kind is EventKind.REWOUND]
    assert (rewound.before, rewound.after) == (12, 5)
    _, _, manual = managed(batches[:5] + batches[12:])
    assert differences(ours, manual) == []
    assert (result["steps"], result["applied_steps"], result["batches"]) == (20, 19, 20)


def test_a_manager_of_a_sharded_model_goes_back() -> None:
    """Under FSDP2, both ranks to the same step: as a run without the batches in between, each shard to the last bit. A tensor-parallel step cannot be captured, and says so."""
    for back, differing, rows, refused in told_by_ranks("tests.integrations.rewinding_shards"):
        assert (back, differing, rows) == ([[12, 5]], [], 4)
        assert refused.startswith(
            "session.capture(1): its step cannot be repeated, as parameters are sharded by other means than FSDP2"
        )
