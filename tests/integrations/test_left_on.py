"""It is safe to leave the callback on: without a fault, FP32 and BF16 runs are what they are without it."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import CallbackHandler

from hf_amp import EventKind, MixedPrecisionCallback, PrecisionMode
from hf_amp.report.reader import read_run
from hf_amp.report.verdict import verdict_on
from tests.host_reads import count_host_reads
from tests.integrations.trainers import (
    OverflowAt,
    Regression,
    arguments,
    numbers,
    parameters_of,
    regression_trainer,
    text,
    tiny_gpt2,
)

EVENTS = [name for name in vars(CallbackHandler) if name.startswith("on_")]
TIMINGS = ("runtime", "per_second", "preparation_time")


class Listener(TrainerCallback):
    """Notes every event with the step, what `control` asks for, and whether there is a gradient."""

    def __init__(self) -> None:
        self.heard: list[Any] = []


def _noting(name: str) -> Any:
    def note(self: Listener, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs.get("model")
        graded = model is not None and any(p.grad is not None for p in model.parameters())
        self.heard.append((name, state.global_step, sorted(kwargs), vars(control).copy(), graded))

    return note


for _name in EVENTS:
    setattr(Listener, _name, _noting(_name))


class AsksFor(TrainerCallback):
    """Asks for a log, an evaluation and a checkpoint in step 3, and to stop after step 5."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_log = control.should_evaluate = control.should_save = state.global_step == 3
        control.should_training_stop = state.global_step == 5
        return control


def without_ours(entry: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in entry.items() if not k.startswith("amp/") and not k.endswith(TIMINGS)}


def outcome(trainer: Trainer, listener: Listener, folder: Path) -> dict[str, Any]:
    """All that a run leaves behind, less our metrics and state."""
    returned = trainer.train()
    evaluated = trainer.evaluate()
    saved = json.loads((folder / "checkpoint-3" / "trainer_state.json").read_text())
    saved["stateful_callbacks"].pop("MixedPrecisionCallback", None)
    saved["log_history"] = [without_ours(entry) for entry in saved["log_history"]]
    saved["best_model_checkpoint"] = None
    return {
        "returned": (returned.global_step, returned.training_loss, without_ours(returned.metrics)),
        "evaluated": without_ours(evaluated),
        "keys": sorted(evaluated),
        "history": [without_ours(entry) for entry in trainer.state.log_history],
        "heard": listener.heard,
        "files": sorted(file.name for file in (folder / "checkpoint-3").iterdir()),
        "state": saved,
    }


MODES = {"fp32": {"fp16": False}, "bf16": {"fp16": False, "bf16": True}}


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("fp32", {}),
        ("bf16", {"gradient_accumulation_steps": 2, "logging_steps": 2}),
        ("fp32", {"max_grad_norm": 0.0, "optim": "sgd", "save_strategy": "steps", "save_steps": 3}),
        ("bf16", {}),
    ],
    ids=["plain", "accumulation", "no clipping", "bf16"],
)
def test_nothing_differs(tmp_path: Path, mode: str, options: dict[str, Any]) -> None:
    """Losses, parameters, logs, what is returned, events and their order, `control`, files, trainer_state.json."""
    outcomes, parameters = [], []
    for name in ("without", "with"):
        listener = Listener()
        ours = [MixedPrecisionCallback()] if name == "with" else []
        torch.manual_seed(0)
        trainer = Trainer(
            tiny_gpt2(),
            arguments(tmp_path / name, max_steps=6, **MODES[mode], **options),
            train_dataset=text(),
            eval_dataset=text().select(range(8)),
            callbacks=[*ours, AsksFor(), listener],
        )
        outcomes.append(outcome(trainer, listener, tmp_path / name))
        parameters.append(parameters_of(trainer))
    for key, value in outcomes[0].items():
        assert outcomes[1][key] == value, key
    assert outcomes[0]["returned"][0] == 5
    assert {"on_save", "on_evaluate", "on_substep_end"} - {event[0] for event in outcomes[0]["heard"]} <= (
        set() if "gradient_accumulation_steps" in options else {"on_substep_end"}
    )
    assert all(torch.equal(a, b) for a, b in zip(*parameters, strict=True))


def test_counting_losses_reads_nothing_a_micro_batch(tmp_path: Path) -> None:
    """The callback reads the host once a step, however many micro-batches that has, and nothing more for counting."""
    reads: dict[tuple[int, bool], int] = {}
    for accumulation in (1, 4):
        for ours in (False, True):
            callbacks = [MixedPrecisionCallback()] if ours else []
            trainer = regression_trainer(
                tmp_path, *callbacks, optim="sgd", gradient_accumulation_steps=accumulation, logging_steps=6
            )
            with count_host_reads() as counted:
                trainer.train()
            reads[accumulation, ours] = counted.count
    before_the_first_step = 1  # whether the weights are finite
    for accumulation in (1, 4):
        assert reads[accumulation, True] - reads[accumulation, False] == 6 + before_the_first_step


def test_in_fp16_events_come_in_the_same_order(tmp_path: Path) -> None:
    """A skipped step has its events, counts for global_step, and leaves the order alone."""
    heard = []
    for ours in ([], [MixedPrecisionCallback()]):
        listener = Listener()
        trainer = regression_trainer(tmp_path, *ours, OverflowAt(2), listener, fp16=True)
        trainer.train()
        heard.append([event[:2] for event in listener.heard])
        assert trainer.state.global_step == 6
    assert heard[0] == heard[1]


@pytest.mark.parametrize(("overflows", "lines"), [((), 2), ((2,), 3), ((2, 4), 3)])
def test_console_has_a_line_for_what_happened(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, overflows: tuple[int, ...], lines: int
) -> None:
    """One at the start and one at the end, always; between them one for skips alike within ten seconds."""
    callback = MixedPrecisionCallback({"init_scale": 1024.0})
    regression_trainer(
        tmp_path, callback, OverflowAt(*overflows), fp16=True, eval_strategy="steps", eval_dataset=numbers()
    ).train()
    shown = [r for r in caplog.records if r.name == "hf_amp" and r.levelno >= logging.WARNING]
    assert len(shown) == lines
    first, last, skipped = shown[0].getMessage(), shown[-1].getMessage(), len(overflows)
    assert first.startswith("hf_amp: FP16 emulated on the CPU")
    assert first.endswith(f", DYNAMIC, log in {tmp_path / 'amp_events.jsonl'}.")
    said = f"{skipped} of 6 steps" if skipped else "all 6 steps were applied"
    assert last.startswith("hf_amp: training ended. Verdict: Training: ")
    assert said in last
    assert f"scale {1024 / 2**skipped:g}, " in last
    assert last.endswith("s in FP16.")


@pytest.mark.parametrize(("steps", "counted"), [(6, "6 steps"), (1, "1 step")])
def test_the_event_log_has_a_summary(tmp_path: Path, steps: int, counted: str) -> None:
    """What was applied and skipped, with the seconds in each precision."""
    callback = MixedPrecisionCallback()
    regression_trainer(tmp_path, callback, max_steps=steps).train()
    ended = next(e for e in callback.session.events if e.kind is EventKind.TRAINING_ENDED)
    assert ended.message.startswith(f"training ended: {counted} applied, 0 skipped, 0 changes of precision")
    assert ended.figures["applied_steps"] == steps
    assert ended.figures.get("fp32_seconds", 0) > 0 or steps == 1


def test_fp32_with_scaling_options_says_that_nothing_is_scaled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And names what would."""
    regression_trainer(tmp_path, MixedPrecisionCallback(init_scale=1024.0), max_steps=1).train()
    assert any("init_scale: nothing is scaled in FP32, only with fp16=True" in line for line in caplog.messages)


@pytest.mark.parametrize(
    ("bad_steps", "lines", "said"),
    [
        (range(1, 11), 1, "Not training: all 10 steps were skipped (fix the data or the loss: "),
        ((1, 2, 3, 5, 6, 8), 1, "Hardly training: 6 of 10 steps (60%) were skipped"),
        ((6, 7, 8, 9, 10), 1, "In doubt: the newest logged loss is not finite; 5 of 10 steps (50%) were skipped"),
    ],
)
def test_the_last_line_judges_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bad_steps: Sequence[int], lines: int, said: str
) -> None:
    """It says what the report says, never "Training" of a run with NaN or with most steps skipped; a repeated skip has few lines."""
    bad_rows = tuple(row for step in bad_steps for row in range(4 * step - 4, 4 * step))
    callback = MixedPrecisionCallback()
    regression_trainer(tmp_path, callback, nan_rows=bad_rows, bf16=True, max_steps=10, logging_steps=5).train()
    shown = [r.getMessage() for r in caplog.records if r.name == "hf_amp" and r.levelno >= logging.WARNING]
    assert said in shown[-1]
    assert shown[-1].startswith(f"hf_amp: training ended. Verdict: {verdict_on(read_run(tmp_path)).sentence}")
    assert "Training" not in shown[-1]
    assert sum("step_skipped" in line for line in shown) == lines


def test_the_last_line_judges_a_run_that_applies_nothing_but_zeros(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All steps are applied, and nothing is learned: the last line says so as well, as a warning."""
    loss = {"compute_loss_func": lambda outputs, labels, **_: outputs["logits"].sum() * 0}
    regression_trainer(tmp_path, MixedPrecisionCallback(patience=5), max_steps=10, **loss).train()
    last = caplog.records[-1]
    assert last.levelno == logging.WARNING
    assert "Not training since step 5: this run learns nothing" in last.getMessage()


def test_time_is_told_by_precision(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A run whose module falls back is told with it, and with the time; one that falls back whole, in both precisions."""

    class Large(torch.nn.Module):
        """A product that leaves the range of FP16 between two layers, and comes back into it."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.up, self.down = torch.nn.Linear(4, 8), torch.nn.Linear(8, 1)
            with torch.no_grad():
                self.up.weight.mul_(1e6)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            y = self.down(torch.tanh(self.up(x) * 1e-6)).squeeze(-1)
            return {"loss": (y - labels).square().mean(), "logits": y}

    callback = MixedPrecisionCallback({"init_scale": 1024.0})
    trainer = Trainer(Large(), arguments(tmp_path, optim="sgd"), train_dataset=numbers(), callbacks=[callback])
    trainer.train()
    assert dict(callback.session.plan.modules) != {}
    summary = caplog.records[-1].getMessage()
    assert "1 module in FP32" in summary
    assert summary.endswith("s in FP16.")
    whole = MixedPrecisionCallback({"init_scale": 1024.0})
    regression_trainer(tmp_path, whole, OverflowAt(2, 3), bf16=True, max_steps=8).train()
    assert whole.session.plan.default is PrecisionMode.FP32
    assert re.search(r"\d s in BF16, \d+\.\d s in FP32\.$", caplog.records[-1].getMessage())


@pytest.mark.parametrize("stop", [False, True])
def test_hopeless_run_is_told_and_stopped_if_configured(tmp_path: Path, stop: bool) -> None:
    """Every step skipped: after `patience` steps it is said; with stop_when_stalled it ends, the good checkpoint kept."""
    callback = MixedPrecisionCallback({"patience": 4, "stop_when_stalled": stop, "automatic_fallback": False})
    trainer = regression_trainer(
        tmp_path, callback, nan_rows=tuple(range(8, 64)), fp16=True, max_steps=12, save_strategy="steps",
        save_steps=2, save_total_limit=2,
    )  # fmt: skip
    trainer.train()
    (stalled,) = [e for e in callback.session.events if e.kind is EventKind.STALLED]
    assert stalled.cause == "INPUT"
    stopped = [e for e in callback.session.events if e.kind is EventKind.TRAINING_STOPPED]
    assert trainer.state.global_step == (stalled.step if stop else 12)
    assert len(stopped) == stop
    if stop:
        assert "checkpoint-" in stopped[0].message


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_an_optimizer_of_another_models_parameters_is_told(tmp_path: Path, precision: str) -> None:
    """One made before the model was replaced: stock FP16 ends with an assertion, others train nothing without a word."""
    callback = MixedPrecisionCallback({"patience": 3, "stop_when_stalled": True})
    trainer = Trainer(
        Regression(),
        arguments(tmp_path, fp16=precision == "fp16", bf16=precision == "bf16"),
        train_dataset=numbers(),
        optimizers=(torch.optim.AdamW(Regression().parameters()), None),
        callbacks=[callback],
    )
    trainer.train()
    (stalled,) = [e for e in callback.session.events if e.kind is EventKind.STALLED]
    assert (stalled.step, stalled.cause, trainer.state.global_step) == (3, "UNKNOWN", 3)
    assert "for 3 steps no parameter that the optimizer holds had a gradient" in stalled.message
    assert "made before the model was wrapped, resized or replaced" in stalled.message


def test_poisoned_weights_are_told_before_the_first_step(tmp_path: Path) -> None:
    """A model that comes with NaN is hopeless at once, by name; with stop_when_stalled it takes one step, not all."""
    callback = MixedPrecisionCallback({"stop_when_stalled": True})
    trainer = regression_trainer(tmp_path, callback)
    with torch.no_grad():
        trainer.model.hidden.bias[0] = torch.nan
    trainer.train()
    (stalled,) = [e for e in callback.session.events if e.kind is EventKind.STALLED]
    assert (stalled.step, stalled.cause) == (0, "WEIGHTS")
    assert "hidden.bias" in stalled.message
    assert trainer.state.global_step == 1
