"""Runs that go on from a checkpoint: with the callback, from one made without it, and in another precision."""

from __future__ import annotations

import functools
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import Trainer

from hf_amp import EventKind, MixedPrecisionCallback, PrecisionMode
from hf_amp.fallback.plan import PrecisionPlan
from tests.integrations.trainers import OverflowAt, StockFP16OnCPU, parameters_of, regression_trainer, strict_json
from tests.reference import TIMINGS

PRECISIONS = {"fp32": {}, "bf16": {"bf16": True}, "fp16": {"fp16": True}}
SAVING = {"save_strategy": "steps", "save_steps": 4}


class Whole(NamedTuple):
    """A run of six steps, the second and the last of which were skipped, with a checkpoint after the fourth."""

    trainer: Trainer
    callback: MixedPrecisionCallback
    checkpoint: str


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Whole]:
    """That run, by precision; each is trained once."""

    @functools.cache
    def run(precision: str) -> Whole:
        folder, callback = tmp_path_factory.mktemp(precision), MixedPrecisionCallback()
        trainer = regression_trainer(folder, callback, OverflowAt(2, 6), **PRECISIONS[precision], **SAVING)
        trainer.train()
        return Whole(trainer, callback, str(folder / "checkpoint-4"))

    return run


def resumed(
    folder: Path, saved: str, precision: str, late: bool = False, **options: Any
) -> tuple[Trainer, MixedPrecisionCallback]:
    """A new Trainer that has gone on from `saved`; `late`: the callback was added after its construction."""
    callback = MixedPrecisionCallback()
    early = [] if late else [callback]
    trainer = regression_trainer(folder, *early, OverflowAt(6), **PRECISIONS[precision], **options)
    if late:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=saved)
    return trainer, callback


def untimed(callback: MixedPrecisionCallback) -> list[dict[str, Any]]:
    """Metrics and saved state of a callback, less what clocks have measured."""
    state = callback.state()
    del state["attributes"]["progress"]["stateful"]["throughput"]
    return [state, {name: v for name, v in callback.session.metrics().items() if name not in TIMINGS}]


def test_14_stock_cannot_leave_fp16(tmp_path: Path, whole: Callable[[str], Whole]) -> None:
    """Upstream loads a checkpoint's loss scale into nothing, and the run ends."""
    for precision in ("fp32", "bf16"):
        trainer = regression_trainer(tmp_path, **PRECISIONS[precision])
        with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'load_state_dict'"):
            trainer.train(resume_from_checkpoint=whole("fp16").checkpoint)


@pytest.mark.parametrize(
    ("before", "after", "late"),
    [(*pair, bool(number % 2)) for number, pair in enumerate(itertools.product(PRECISIONS, repeat=2))],
)
def test_14_and_15_any_precision_goes_on_from_any(
    tmp_path: Path, whole: Callable[[str], Whole], before: str, after: str, late: bool
) -> None:
    """Counters go on, the new precision runs and is told, and what was saved in another is not taken for its own."""
    _, callback = resumed(tmp_path, whole(before).checkpoint, after, late)
    figures = callback.session.metrics()
    assert (figures["applied_steps"], figures["skipped_steps"]) == (4, 2)
    assert [e.step for e in callback.session.events if e.kind is EventKind.STEP_SKIPPED] == [6]
    modes = {"fp32": PrecisionMode.FP32, "bf16": PrecisionMode.BF16, "fp16": PrecisionMode.MIXED}
    assert callback.session.requested_mode is modes[after]
    if before != after:
        assert callback.session.plan == PrecisionPlan(modes[after])
    expected = {"fp16": 16384.0 if before == "fp16" else 32768.0}.get(after, 1.0)
    assert callback.session.scaler.get_scale() == expected
    started = next(e for e in callback.session.events if e.kind is EventKind.TRAINING_STARTED)
    assert "resumes after step 4" in started.message
    reported = f"it was {modes[before].value} before"
    assert (reported in started.message) == (before != after)


@pytest.mark.parametrize(
    ("precision", "late", "restore"),
    [
        ("fp32", False, False), ("fp32", True, True), ("bf16", True, False), ("bf16", False, True),
        ("fp16", False, True), ("fp16", True, False),
    ],
)  # fmt: skip
def test_a_resumed_run_equals_one_that_was_not_interrupted(
    tmp_path: Path, whole: Callable[[str], Whole], precision: str, late: bool, restore: bool
) -> None:
    """Parameters, metrics and the callback's whole state: six steps equal four and two, to the last bit; also where the
    callback was added late, and where Trainer restores it."""
    trainer, unbroken, saved = whole(precision)
    again, callback = resumed(
        tmp_path, saved, precision, late, restore_callback_states_from_checkpoint=restore, **SAVING
    )
    assert untimed(callback) == untimed(unbroken)
    for a, b in zip(parameters_of(trainer), parameters_of(again), strict=True):
        assert torch.equal(a, b)


def test_the_state_in_the_checkpoint_is_plain_and_complete(tmp_path: Path) -> None:
    """trainer_state.json holds options and progress; a callback made from it says the same."""
    callback = MixedPrecisionCallback({"init_scale": 1024.0})
    regression_trainer(tmp_path, callback, OverflowAt(2), fp16=True, **SAVING).train()
    states = strict_json(tmp_path / "checkpoint-4" / "trainer_state.json")["stateful_callbacks"]
    state = states["MixedPrecisionCallback"]
    assert state["attributes"]["progress"]["counters"] == {"applied_steps": 3, "skipped_steps": 1}
    assert MixedPrecisionCallback.from_state(state).config == callback.config


def test_a_callback_that_the_trainer_restores_goes_on_with_the_session(
    tmp_path: Path, whole: Callable[[str], Whole]
) -> None:
    """Trainer replaces the callback by a new one: there is one session still, and the old callback knows it."""
    trainer, callback = resumed(
        tmp_path, whole("fp16").checkpoint, "fp16", restore_callback_states_from_checkpoint=True
    )
    held = [c for c in trainer.callback_handler.callbacks if isinstance(c, MixedPrecisionCallback)]
    assert len(held) == 1
    assert held[0] is not callback
    assert held[0].session is callback.session
    callback.session.detach()
    assert "_hf_amp_callback" not in vars(trainer)


@pytest.fixture(scope="module")
def stock_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """After four steps of a run in FP16 without hf_amp."""
    folder, stock = tmp_path_factory.mktemp("stock"), StockFP16OnCPU(init_scale=512.0)
    stock.trainer = regression_trainer(folder, stock, fp16=True, optim="adamw_torch", **SAVING)
    stock.trainer.train()
    return folder / "checkpoint-4"


@pytest.mark.parametrize(("after", "late"), [("fp32", False), ("bf16", True), ("fp16", False), ("fp16", True)])
def test_from_a_stock_checkpoint(tmp_path: Path, stock_checkpoint: Path, after: str, late: bool) -> None:
    """Made before hf_amp was added: the stock scale goes on in FP16, is left aside elsewhere, and saving works."""
    assert (stock_checkpoint / "scaler.pt").exists()
    trainer, callback = resumed(
        tmp_path, str(stock_checkpoint), after, late,
        optim="adamw_torch", save_strategy="steps", save_steps=6,
    )  # fmt: skip
    assert callback.session.metrics()["applied_steps"] == 1
    assert callback.session.metrics()["skipped_steps"] == 1
    assert callback.session.scaler.get_scale() == (256.0 if after == "fp16" else 1.0)
    assert trainer.state.global_step == 6
    states = strict_json(tmp_path / "checkpoint-6" / "trainer_state.json")["stateful_callbacks"]
    assert states["MixedPrecisionCallback"]["attributes"]["progress"]["counters"]["skipped_steps"] == 1


def test_a_plan_goes_on_too(tmp_path: Path, whole: Callable[[str], Whole]) -> None:
    """Modules that were in FP32 when the checkpoint was written are in FP32 after it."""
    saved = shutil.copytree(whole("fp16").checkpoint, tmp_path / "saved")
    scaler = saved / "scaler.pt"
    state = torch.load(scaler, weights_only=True)
    state["hf_amp"]["stateful"]["fallback"]["plan"]["modules"] = {"hidden": "FP32"}
    torch.save(state, scaler)
    file = saved / "trainer_state.json"
    file.write_text(file.read_text().replace('"modules": {}', '"modules": {"hidden": "FP32"}'))
    _, callback = resumed(tmp_path / "again", str(saved), "fp16")
    assert dict(callback.session.plan.modules) == {"hidden": PrecisionMode.FP32}
