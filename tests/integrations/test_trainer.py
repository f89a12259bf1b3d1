"""`MixedPrecisionCallback` on a stock Trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from hf_amp import (
    AdvancedGradScaler,
    AttachError,
    Cause,
    ConfigError,
    EventKind,
    MixedPrecisionCallback,
    MixedPrecisionConfig,
    PrecisionMode,
)
from hf_amp.monitoring.metrics import NAMES
from tests.integrations.trainers import OverflowAt, StockFP16OnCPU, arguments, strict_json, trainer_with
from tests.reference import TIMINGS, assert_bitwise_equal


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_overflow_is_skipped_and_told_truthfully(tmp_path: Path, optim: str, max_grad_norm: float) -> None:
    """On the overflowing step nothing moves: not parameters, optimizer state or schedule; and everybody says so."""
    callback = MixedPrecisionCallback()
    trainer, witness = trainer_with(tmp_path, callback, OverflowAt(3), optim=optim, max_grad_norm=max_grad_norm)
    trainer.train()
    assert witness.moved == [True, True, False, True, True, True]
    assert witness.state_moved == [True, True, False, True, True, True]
    assert witness.skipped == [False, False, True, False, False, False]
    assert witness.rates[2] == witness.rates[1] > witness.rates[3]
    figures = callback.session.metrics()
    assert (figures["applied_steps"], figures["skipped_steps"]) == (5, 1)
    skips = [event for event in callback.session.events if event.kind is EventKind.STEP_SKIPPED]
    assert [(e.step, e.cause, e.before, e.after) for e in skips] == [(3, Cause.SCALE, 65536.0, 32768.0)]


def test_upstream_fails_this_with_a_fused_optimizer(tmp_path: Path) -> None:
    """With the stock scaler the fused optimizer's skip is not noticed and the schedule runs on."""
    stock = StockFP16OnCPU()
    trainer, witness = trainer_with(tmp_path, OverflowAt(3), stock)
    stock.trainer = trainer
    trainer.train()
    assert witness.moved[2] is False
    assert witness.skipped[2] is False
    assert witness.rates[2] < witness.rates[1]


def test_metrics_are_in_every_log_entry_and_in_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `log_all_metrics`, `log_history` and a TensorBoard file read back hold the same `amp/` values at the same steps."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    callback = MixedPrecisionCallback(log_all_metrics=True)
    trainer, _ = trainer_with(tmp_path, callback, OverflowAt(3), report_to="tensorboard")
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["amp/skipped_steps"] for entry in entries] == [0, 0, 1, 1, 1, 1]
    assert [entry["amp/applied_steps"] for entry in entries] == [1, 2, 2, 3, 4, 5]
    assert entries[0]["amp/scale"] == 65536.0
    assert entries[-1]["amp/scale"] == 32768.0
    assert "amp/grad_amax" in entries[0]
    assert entries[0]["amp/grad_norm"] == pytest.approx(entries[0]["grad_norm"], rel=1e-5)
    assert not any(key in entries[2] for key in ("grad_norm", "amp/grad_norm", "amp/grad_amax"))
    assert {key.removeprefix("amp/") for entry in entries for key in entry if key.startswith("amp/")} <= NAMES
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = events.EventAccumulator(str(tmp_path / "tb")).Reload()
    tag = next(tag for tag in board.Tags()["scalars"] if tag.endswith("amp/scale"))
    assert [(s.step, s.value) for s in board.Scalars(tag)] == [(entry["step"], entry["amp/scale"]) for entry in entries]


def test_an_entry_has_six_metrics_and_reporters_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that say how the run is, of which zeros but for skipped steps are left out; once each in TensorBoard's file."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    callback = MixedPrecisionCallback()
    trainer, _ = trainer_with(tmp_path, callback, OverflowAt(3), report_to="tensorboard")
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(0 < sum(key.startswith("amp/") for key in entry) <= 6 for entry in entries)
    assert {"amp/scale", "amp/skipped_steps", "amp/grad_norm", "amp/headroom_bits"} <= entries[0].keys()
    assert entries[3]["amp/skipped_steps_scale"] == 1
    assert "amp/precision_changes" not in entries[3]
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = events.EventAccumulator(str(tmp_path / "tb")).Reload()
    written = {tag.removeprefix("train/amp/") for tag in board.Tags()["scalars"] if tag.startswith("train/amp/")}
    assert written >= callback.session.metrics().keys()
    assert all(len(board.Scalars(f"train/amp/{name}")) == 6 for name in ("scale", "applied_steps", "skip_rate"))


def test_trainer_state_stays_valid_json(tmp_path: Path) -> None:
    """Saved with skipped steps in it, trainer_state.json has no bare NaN or Infinity."""
    trainer, _ = trainer_with(tmp_path, MixedPrecisionCallback(), OverflowAt(2, 3), save_strategy="steps", save_steps=6)
    trainer.train()
    assert strict_json(tmp_path / "checkpoint-6" / "trainer_state.json")["log_history"]


def test_event_log_tells_the_run(tmp_path: Path) -> None:
    """amp_events.jsonl has the start, what was before it, the skip, the end and every logging step, with the run's id."""
    callback = MixedPrecisionCallback()
    trainer, _ = trainer_with(tmp_path, callback, OverflowAt(3))
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "amp_events.jsonl").read_text().splitlines()]
    assert {line["run_id"] for line in lines} == {callback.session.run_id}
    metrics = [line for line in lines if line["event"] == "metrics"]
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [(line["step"], line["loss"], line["scale"]) for line in metrics] == [
        (entry["step"], entry["loss"], entry["amp/scale"]) for entry in entries
    ]
    lines = [line for line in lines if line["event"] != "metrics"]
    reported = ["training_started", "attached", "step_skipped", "training_ended"]
    assert [line["event"] for line in lines] == reported
    assert (lines[2]["step"], lines[2]["cause"], lines[2]["after"]) == (3, "SCALE", 32768.0)


def test_callback_added_after_construction_does_the_same(tmp_path: Path) -> None:
    """`trainer.add_callback` gives the parameters that `callbacks=[...]` gives, to the last bit."""
    runs = []
    for late in (False, True):
        callback = MixedPrecisionCallback()
        trainer, _ = trainer_with(tmp_path, *([] if late else [callback]), OverflowAt(3))
        if late:
            trainer.add_callback(callback)
        trainer.train()
        assert callback.session.metrics()["skipped_steps"] == 1
        runs.append([p.detach().clone() for p in trainer.model.parameters()])
    for early, late in zip(*runs, strict=True):
        assert torch.equal(early, late)


@pytest.mark.parametrize("late", [False, True])
def test_real_half_kernels(tmp_path: Path, late: bool) -> None:
    """emulate=False computes in real half: modules see FP16, outputs leave the model in FP32."""
    seen = []
    callback = MixedPrecisionCallback(MixedPrecisionConfig(emulate=False))
    trainer, _ = trainer_with(tmp_path, *([] if late else [callback]), max_steps=2)
    if late:
        trainer.add_callback(callback)
    trainer.model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    trainer.train()
    assert set(seen) == {torch.float16}
    assert trainer.model(torch.zeros(1, 4, dtype=torch.long)).logits.dtype == torch.float32
    assert "real FP16" in callback.session.describe()


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({"fp16": True}, PrecisionMode.MIXED),
        ({"fp16": False, "bf16": True}, PrecisionMode.BF16),
        ({"fp16": False}, PrecisionMode.FP32),
    ],
)
def test_training_arguments_are_followed(tmp_path: Path, options: dict[str, bool], mode: PrecisionMode) -> None:
    """fp16, bf16 or neither decide the plan; a precision_mode that contradicts them is an error that names both."""
    callback = MixedPrecisionCallback()
    trainer, _ = trainer_with(tmp_path, callback, **options, max_steps=2)
    trainer.train()
    assert callback.session.plan.default is mode
    assert dict(callback.session.plan.modules) == {}
    other = PrecisionMode.FP32 if mode is not PrecisionMode.FP32 else PrecisionMode.MIXED
    with pytest.raises(ConfigError) as raised:
        trainer_with(tmp_path, MixedPrecisionCallback({"precision_mode": other.value}), **options)
    assert f"precision_mode={other.value}" in str(raised.value)
    assert "TrainingArguments" in str(raised.value)
    assert "leave precision_mode out" in str(raised.value)


def test_training_twice_and_two_trainers_with_one_config(tmp_path: Path) -> None:
    """A second train() goes on under the same session; another Trainer gets a session of its own."""
    config = MixedPrecisionConfig()
    callback = MixedPrecisionCallback(config)
    trainer, witness = trainer_with(tmp_path, callback, OverflowAt(3))
    trainer.train()
    session = callback.session
    trainer.train()
    assert callback.session is session
    assert witness.skipped == [False, False, True, False, False, False] * 2
    assert session.metrics()["skipped_steps"] == 2
    other = MixedPrecisionCallback(config)
    trainer_with(tmp_path, other)[0].train()
    assert other.session is not session
    assert other.session.metrics()["skipped_steps"] == 0
    assert session.metrics()["applied_steps"] == 10


def test_class_instead_of_instance(tmp_path: Path) -> None:
    """`callbacks=[MixedPrecisionCallback]` works as with any callback."""
    trainer, _ = trainer_with(tmp_path, MixedPrecisionCallback, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["amp/skipped_steps"] == 0


def test_resume_continues_scale_and_counters(tmp_path: Path) -> None:
    """Six steps, with a checkpoint after four, equal four steps and two resumed: parameters, scale, counters."""
    whole = MixedPrecisionCallback()
    trainer, _ = trainer_with(tmp_path, whole, OverflowAt(2, 6), save_strategy="steps", save_steps=4)
    trainer.train()
    resumed = MixedPrecisionCallback()
    again, _ = trainer_with(tmp_path / "again", resumed, OverflowAt(2, 6))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    figures = [
        {name: value for name, value in run.session.metrics().items() if name not in TIMINGS}
        for run in (resumed, whole)
    ]
    assert figures[0] == figures[1]
    assert resumed.session.metrics()["skipped_steps"] == 2
    for a, b in zip(trainer.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_detach_gives_back_trainer_accelerator_and_model(tmp_path: Path) -> None:
    """After detach the attributes of all three are those of a Trainer that never had the callback."""

    def shape(trainer: Trainer) -> list[Any]:
        accelerator = {k: v for k, v in vars(trainer.accelerator).items() if k[0] != "_" and k != "state"}
        optimizer = trainer.optimizer
        return [
            sorted(vars(trainer)),
            {k: v for k, v in accelerator.items() if isinstance(v, (bool, int, type(None)))},
            sorted(accelerator),
            sorted(vars(optimizer)),
            optimizer.scaler,
            trainer.accelerator.scaler,
            [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in trainer.model.modules()],
            "forward" in vars(trainer.model),
        ]

    callback = MixedPrecisionCallback()
    with_it, _ = trainer_with(tmp_path, callback)
    without, _ = trainer_with(tmp_path)
    with_it.train()
    without.train()
    assert shape(with_it) != shape(without)
    callback.session.detach()
    callback.session.detach()
    assert shape(with_it) == shape(without)


def test_not_called_by_a_trainer_is_a_clear_error(tmp_path: Path) -> None:
    """Called by something else, the callback says where it belongs."""
    with pytest.raises(AttachError, match="callbacks=") as raised:
        MixedPrecisionCallback().on_init_end(arguments(tmp_path), None, None)
    assert "hf_amp.attach(accelerator)" in str(raised.value)


@pytest.mark.parametrize("config", [3, ["init_scale"]])
def test_config_of_the_wrong_type_is_a_clear_error(config: object) -> None:
    """The error says which types are allowed."""
    with pytest.raises(ConfigError, match="pass a MixedPrecisionConfig, a dict"):
        MixedPrecisionCallback(config)


def test_config_from_file(tmp_path: Path) -> None:
    """A YAML file is as good as an object."""
    (tmp_path / "amp.yaml").write_text("init_scale: 1024.0\nscaling_strategy: constant\n")
    assert MixedPrecisionCallback(tmp_path / "amp.yaml").config == MixedPrecisionConfig(
        init_scale=1024.0, scaling_strategy="CONSTANT"
    )


def test_disabled_config_changes_nothing(tmp_path: Path) -> None:
    """enabled=False gives the log, to the last key, and the attributes of a Trainer without the callback."""
    histories, attributes = [], []
    for callbacks in ([], [MixedPrecisionCallback({"enabled": False})]):
        trainer, _ = trainer_with(tmp_path, *callbacks, max_steps=3)
        trainer.train()
        histories.append(trainer.state.log_history[:-1])
        attributes.append(
            sorted(set(vars(trainer)) - {"_hf_amp_callback", "__getstate__"}) + sorted(vars(trainer.state))
        )
        assert not isinstance(trainer.accelerator.scaler, AdvancedGradScaler)
    assert histories[0] == histories[1]
    assert attributes[0] == attributes[1]


def test_a_disabled_run_says_that_it_is(tmp_path: Path) -> None:
    """No event claims FP16, which Trainer leaves out on a CPU, or steps that nobody counted."""
    callback = MixedPrecisionCallback({"enabled": False})
    trainer, _ = trainer_with(tmp_path, callback, max_steps=1)
    trainer.train()
    reported = {event.kind: event.message for event in callback.session.events}
    assert reported[EventKind.TRAINING_STARTED] == "training starts: without hf_amp, which the config disables."
    assert reported[EventKind.TRAINING_ENDED] == "training ended: hf_amp, which the config disables, counted nothing."


@pytest.mark.parametrize("enabled", [True, False])
def test_two_callbacks_are_a_clear_error(tmp_path: Path, enabled: bool) -> None:
    """It says to leave one out, whether it comes with the Trainer or is added later."""
    config = {"enabled": enabled}
    with pytest.raises(AttachError, match="two MixedPrecisionCallbacks: leave one of them out"):
        trainer_with(tmp_path, MixedPrecisionCallback(config), MixedPrecisionCallback(config))
    trainer, _ = trainer_with(tmp_path, MixedPrecisionCallback(config))
    trainer.add_callback(MixedPrecisionCallback(config))
    with pytest.raises(AttachError, match="two MixedPrecisionCallbacks: leave one of them out"):
        trainer.train()


def test_poisoned_weights_are_named(tmp_path: Path) -> None:
    """When a parameter is NaN the cause is WEIGHTS and the message names it."""
    callback = MixedPrecisionCallback()
    trainer, _ = trainer_with(tmp_path, callback, max_steps=1)
    with torch.no_grad():
        trainer.model.transformer.h[0].mlp.c_fc.weight[0, 0] = torch.nan
    trainer.train()
    event = next(e for e in callback.session.events if e.kind is EventKind.STEP_SKIPPED)
    assert event.cause is Cause.WEIGHTS
    assert "transformer.h.0.mlp.c_fc.weight" in event.message


@pytest.mark.gpu
def test_cuda_fp16(tmp_path: Path) -> None:
    """The same skip on a GPU in real FP16, with the Trainer's default fused optimizer."""
    callback = MixedPrecisionCallback()
    trainer, witness = trainer_with(tmp_path, callback, OverflowAt(3), use_cpu=False)
    trainer.train()
    assert witness.moved == [True, True, False, True, True, True]
    assert witness.skipped == [False, False, True, False, False, False]
    assert callback.session.hardware.device == "cuda"


def test_fp16_loss_on_real_text_is_within_one_percent_of_fp32(tmp_path: Path) -> None:
    """The demo in emulated FP16 ends within 1% of the demo in FP32 with the same seed."""
    from hf_amp.cli.demo_training import train

    last = {}
    for precision in ("fp16", "fp32"):
        train(precision, MixedPrecisionConfig(), 30, tmp_path / precision)
        state = json.loads((tmp_path / precision / "checkpoint-30" / "trainer_state.json").read_text(encoding="utf-8"))
        last[precision] = [log["loss"] for log in state["log_history"] if "loss" in log][-1]
    assert last["fp16"] == pytest.approx(last["fp32"], rel=0.01)
    assert last["fp16"] != last["fp32"]


def test_a_callback_with_keywords_joins_a_trainer_that_exists(tmp_path: Path) -> None:
    """`trainer=` and options as keywords: the run is that of a callback which was passed on with a config."""
    config = MixedPrecisionConfig(init_scale=512.0, growth_interval=2)
    passed_on = MixedPrecisionCallback(config)
    first, _ = trainer_with(tmp_path / "passed on", passed_on, fp16=True)
    first.train()
    second, _ = trainer_with(tmp_path / "joined", fp16=True)
    joined = MixedPrecisionCallback(trainer=second, init_scale=512.0, growth_interval=2)
    second.train()
    assert joined.config == config
    assert joined.session.metrics()["applied_steps"] == passed_on.session.metrics()["applied_steps"] > 0
    assert joined.session.scaler.get_scale() == passed_on.session.scaler.get_scale() > 512.0
    assert_bitwise_equal(list(second.model.parameters()), list(first.model.parameters()))


@pytest.mark.parametrize("handed", [True, False])
def test_the_log_names_the_optimizer_that_steps(tmp_path: Path, handed: bool) -> None:
    """One that was handed to the Trainer, with its own learning rates, or the one that its arguments ask for."""
    callback = MixedPrecisionCallback()
    trainer, _ = trainer_with(tmp_path, callback, optim="adamw_torch_fused")
    if handed:
        first, *others = trainer.model.parameters()
        trainer.optimizer = torch.optim.SGD([{"params": [first], "lr": 0.02}, {"params": others, "lr": 0.5}])
    trainer.train()
    started = json.loads((tmp_path / "amp_events.jsonl").read_text().splitlines()[0])
    asked = f"AdamW, fused, learning rate {trainer.args.learning_rate:g}"
    expected = "SGD, learning rate 0.02 to 0.5" if handed else asked
    assert started["settings"]["optimizer"] == f"{expected}, {trainer.args.lr_scheduler_type.value} schedule"
