"""What people suffer with a stock Trainer: each pain shown there first, then gone with the callback."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, set_seed

from hf_amp import Cause, EventKind, MixedPrecisionCallback, PrecisionMode
from hf_amp.cli import demo_training
from hf_amp.emulation import EmulatedPrecision
from hf_amp.fallback.module_precision import ForwardContext
from tests.integrations.half_models import dtypes, loaded
from tests.integrations.trainers import (
    OverflowAt,
    StockFP16OnCPU,
    Witness,
    all_finite,
    arguments,
    logged,
    numbers,
    parameters_of,
    regression_trainer,
    strict_json,
    text,
    tiny_gpt2,
)

EXAMPLES = Path(__file__).parents[2] / "examples"
NAN_ROW = 9  # in the third batch of four


def stock_and_ours(folder: Path, *others: Any, config: Any = None, **options: Any) -> list[Trainer]:
    """The same run twice, without the callback and with it."""
    trainers = []
    for name, callbacks in {"stock": [], "ours": [MixedPrecisionCallback(config)]}.items():
        trainer = regression_trainer(folder / name, *callbacks, *others, **options)
        trainer.train()
        trainers.append(trainer)
    return trainers


def stock_scaled(folder: Path, *others: Any, **options: Any) -> Trainer:
    """A Trainer with the stock scaler, as on a GPU."""
    stock = StockFP16OnCPU(**options.pop("scaler", {}))
    stock.trainer = regression_trainer(folder, *others, stock, **{"fp16": True, **options})
    return stock.trainer


def stock_fp16_run(folder: Path, model: Any, emulate: bool, **options: Any) -> Trainer:
    """A Trainer with the stock scaler on text, in accelerate's own FP16 autocast or with its products emulated."""
    set_seed(0)
    fp16 = demo_training.StockFP16OnCPU(emulate)
    return Trainer(model, arguments(folder, **options), train_dataset=text(), callbacks=[fp16])


class SkipsNaN(TrainerCallback):
    """What a user does against NaN by hand: gradients that are not finite become zero."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for parameter in kwargs["model"].parameters():
            parameter.grad.nan_to_num_(0.0, 0.0, 0.0)


def events_of(trainer: Trainer, kind: EventKind) -> list[Any]:
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, MixedPrecisionCallback))
    return [event for event in callback.session.events if event.kind is kind]


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_1_and_2_one_nan_batch_ends_the_run_behind_a_loss_of_zero(tmp_path: Path, bf16: bool) -> None:
    """Stock: every weight is NaN, and the log says loss 0.0. Ours: one step skipped and told, NaN there, the loss lives."""
    stock, ours = stock_and_ours(tmp_path, nan_rows=(NAN_ROW,), bf16=bf16)
    assert logged(stock, "loss")[3:] == [0.0, 0.0, 0.0]
    assert not all_finite(stock)
    assert all_finite(ours)
    assert [loss > 0 for loss in logged(ours, "loss")] == [True, True, False, True, True, True]
    assert math.isnan(logged(ours, "loss")[2])
    assert [event.step for event in events_of(ours, EventKind.STEP_SKIPPED)] == [3]
    assert logged(ours, "amp/non_finite_loss_fraction") == [None, None, 1, None, None, None]


def test_without_the_filter_one_nan_is_logged_for_ever(tmp_path: Path) -> None:
    """Stock subtracts NaN from NaN, and never logs a number again, though the weights live. Ours logs it once."""
    lives, ours = (
        regression_trainer(
            tmp_path, *callbacks, nan_rows=(NAN_ROW,), logging_nan_inf_filter=False, learning_rate=0.0,
            weight_decay=0.0, optim="sgd", max_grad_norm=0.0,
        )
        for callbacks in ([SkipsNaN()], [MixedPrecisionCallback()])
    )  # fmt: skip
    for trainer in (lives, ours):
        trainer.train()
        assert all_finite(trainer)
    finite = [torch.tensor(logged(trainer, "loss")).isfinite().tolist() for trainer in (lives, ours)]
    assert finite == [[True] * 2 + [False] * 4, [True] * 2 + [False] + [True] * 3]


class PoisonAt4(TrainerCallback):
    """Makes a weight NaN before the fourth step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            torch.nn.init.constant_(kwargs["model"].output.bias, torch.nan)


def test_3_nan_checkpoints_rotate_the_good_one_out(tmp_path: Path) -> None:
    """Stock keeps the NaN checkpoint only. Ours writes none, keeps the good one and says so."""
    options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    stock, ours = stock_and_ours(tmp_path, PoisonAt4(), **options)
    assert [folder.name for folder in (tmp_path / "stock").glob("checkpoint-*")] == ["checkpoint-6"]
    assert not all_finite(stock)
    assert [folder.name for folder in (tmp_path / "ours").glob("checkpoint-*")] == ["checkpoint-2"]
    withheld = events_of(ours, EventKind.CHECKPOINT_WITHHELD)
    assert [event.step for event in withheld] == [4, 6]
    assert "output.bias" in withheld[0].message
    (stalled,) = events_of(ours, EventKind.STALLED)
    assert (stalled.step, stalled.cause) == (4, Cause.WEIGHTS)


def test_3_a_nan_checkpoint_is_not_the_best(tmp_path: Path) -> None:
    """What a model of NaN scores can be the best so far: stock saves it as such. In ours the good one stays the best."""
    scores = iter([0.5, 0.6, 0.7] * 2)
    options = {
        "save_strategy": "best", "metric_for_best_model": "accuracy", "greater_is_better": True, "save_total_limit": 1,
        "eval_strategy": "steps", "eval_steps": 2, "eval_dataset": numbers(),
        "compute_metrics": lambda predictions: {"accuracy": next(scores)},
    }  # fmt: skip
    stock, ours = stock_and_ours(tmp_path, PoisonAt4(), **options)
    assert [trainer.state.best_global_step for trainer in (stock, ours)] == [6, 2]
    assert [folder.name for folder in (tmp_path / "stock").glob("checkpoint-*")] == ["checkpoint-6"]
    assert [folder.name for folder in (tmp_path / "ours").glob("checkpoint-*")] == ["checkpoint-2"]
    assert [event.step for event in events_of(ours, EventKind.CHECKPOINT_WITHHELD)] == [4, 6]
    assert [entry["eval_accuracy"] for entry in ours.state.log_history if "eval_accuracy" in entry] == [0.5, 0.6, 0.7]


def test_5_a_scale_without_a_floor_writes_infinities_into_weights(tmp_path: Path) -> None:
    """After many overflows 1 / scale is inf: stock's next clean step poisons the weights. Ours stays at its floor."""
    overflows = OverflowAt(*range(1, 13))
    stock = stock_scaled(tmp_path, overflows, max_steps=14, scaler={"init_scale": 2.0**-120})
    stock.train()
    assert not all_finite(stock)
    callback = MixedPrecisionCallback({"init_scale": 2.0**-20})
    ours = regression_trainer(tmp_path, callback, overflows, fp16=True, max_steps=14, optim="sgd")
    ours.train()
    assert callback.session.scaler.get_scale() == 2.0**-24
    assert all_finite(ours)
    assert len(events_of(ours, EventKind.SCALE_AT_FLOOR)) == 1


def test_9_one_bad_micro_batch_discards_a_window_behind_a_healthy_loss(tmp_path: Path) -> None:
    """Stock logs a loss as if nothing were wrong. Ours logs beside it that a quarter of the micro-batches was lost."""
    options = {"nan_rows": (NAN_ROW,), "gradient_accumulation_steps": 4, "max_steps": 3}
    stock, ours = stock_and_ours(tmp_path, **options)
    assert logged(stock, "loss")[0] == logged(ours, "loss")[0] > 0
    assert set(stock.state.log_history[0]) == {"loss", "grad_norm", "learning_rate", "epoch", "step"}
    assert logged(ours, "amp/non_finite_loss_fraction") == [0.25, None, None]
    (skip,) = events_of(ours, EventKind.STEP_SKIPPED)
    assert (skip.figures["losses"], skip.figures["non_finite_losses"]) == (4, 1)


def test_the_share_is_of_what_the_logged_loss_is_the_mean_of(tmp_path: Path) -> None:
    """Two steps an entry, four micro-batches a step: one bad one of eight, and of sixteen in all."""
    _, ours = stock_and_ours(tmp_path, nan_rows=(NAN_ROW,), gradient_accumulation_steps=4, logging_steps=2, max_steps=4)
    assert logged(ours, "amp/non_finite_loss_fraction") == [0.125, None]


@pytest.mark.parametrize("lost", [(), (NAN_ROW,), (1, 9, 13, 14)])
def test_10_evaluation_hides_batches_that_it_lost(tmp_path: Path, lost: tuple[int, ...]) -> None:
    """Stock's eval_loss is the mean of the finite batches, or NaN in earlier versions, and no more. Ours says how
    many are missing, once."""
    options = {"eval_strategy": "steps", "eval_steps": 6, "eval_dataset": numbers(lost)}
    stock, ours = stock_and_ours(tmp_path, per_device_eval_batch_size=4, **options)
    entries = [next(e for e in t.state.log_history if "eval_loss" in e) for t in (stock, ours)]
    assert entries[1]["eval_loss"] == pytest.approx(entries[0]["eval_loss"], rel=0, abs=0, nan_ok=True) != 0
    batches = len({row // 4 for row in lost})
    assert entries[1]["amp/eval_non_finite_batches"] == batches
    reported = events_of(ours, EventKind.EVALUATION_LOST_BATCHES)
    assert [event.message[:10] for event in reported] == [f"{batches} of 16 ba"][: bool(lost)]
    returned = ours.evaluate()
    assert not any("amp/" in key for key in returned)  # a search would take it for its objective
    assert set(returned) == set(stock.evaluate())


def test_two_evaluations_lose_their_own_batches(tmp_path: Path) -> None:
    """With several evaluation sets each entry of the log has the number of its own."""
    sets = {"clean": numbers(), "dirty": numbers((1, 9))}
    callback = MixedPrecisionCallback()
    trainer = regression_trainer(tmp_path, callback, eval_dataset=sets, per_device_eval_batch_size=4)
    trainer.evaluate()
    lost = [{k: v for k, v in entry.items() if k.startswith("amp/")} for entry in trainer.state.log_history]
    assert lost == [{"amp/eval_clean_non_finite_batches": 0}, {"amp/eval_dirty_non_finite_batches": 2}]


def test_11_a_skip_is_told_until_the_next_step(tmp_path: Path) -> None:
    """Stock still says "skipped" in the micro-steps of the next window. Ours says it of the step that was."""

    class Reader(TrainerCallback):
        def __init__(self) -> None:
            self.seen: list[bool] = []

        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seen.append(kwargs["optimizer"].step_was_skipped)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seen.append(kwargs["optimizer"].step_was_skipped)

    options = {"gradient_accumulation_steps": 2, "max_steps": 2, "optim": "sgd"}
    readers = [Reader(), Reader()]
    stock_scaled(tmp_path, OverflowAt(1), readers[0], **options).train()
    regression_trainer(tmp_path, MixedPrecisionCallback(), OverflowAt(1), readers[1], fp16=True, **options).train()
    assert [reader.seen for reader in readers] == [[False, True, True, False], [False, True, False, False]]


def test_12_fp16_parameters_end_a_run_in_its_first_step(tmp_path: Path) -> None:
    """from_pretrained gives a model the dtype of its file: stock stops, and never says how to go on. Ours makes the
    parameters FP32, says so, and trains."""
    model = loaded(tmp_path / "model", torch.float16)
    stock = stock_fp16_run(tmp_path, model, emulate=False)
    before = parameters_of(stock)
    with pytest.raises(ValueError, match=r"^Attempting to unscale FP16 gradients\.$"):
        stock.train()
    assert stock.state.global_step == 0
    assert all(torch.equal(a, b) for a, b in zip(before, parameters_of(stock), strict=True))
    ours = Trainer(
        loaded(tmp_path / "model", torch.float16), arguments(tmp_path, learning_rate=1e-2),
        train_dataset=text(), callbacks=[MixedPrecisionCallback()],
    )  # fmt: skip
    ours.train()
    (reported,) = events_of(ours, EventKind.PARAMETERS_CONVERTED)
    assert (reported.step, reported.before, reported.after) == (0, "FP16", "FP32")
    losses = logged(ours, "loss")
    assert losses[-1] < losses[0]
    assert dtypes(ours.model) == {torch.float32}


def test_13_bf16_parameters_stand_still_in_an_fp16_run(tmp_path: Path) -> None:
    """CUDA cannot unscale BF16, and a stock run ends there (see the test marked gpu). The CPU can: stock then says that it
    has applied six steps, and most weights are what they were. Ours makes them FP32, says so, and they move."""
    options = {"learning_rate": 1e-5}
    stock = stock_fp16_run(tmp_path, loaded(tmp_path / "model", torch.bfloat16), emulate=True, **options)
    ours = Trainer(
        loaded(tmp_path / "model", torch.bfloat16), arguments(tmp_path, **options),
        train_dataset=text(), callbacks=[MixedPrecisionCallback()],
    )  # fmt: skip
    stood_still = []
    for trainer in (stock, ours):
        before = parameters_of(trainer)
        trainer.train()
        same = sum(int((a == b).sum()) for a, b in zip(before, parameters_of(trainer), strict=True))
        stood_still.append(same / sum(p.numel() for p in before))
    assert stock.accelerator.scaler.get_scale() == 65536.0  # no step was skipped
    assert stood_still[0] > 0.75
    assert stood_still[1] < 0.01
    (reported,) = events_of(ours, EventKind.PARAMETERS_CONVERTED)
    assert (reported.step, reported.before, reported.after) == (0, "BF16", "FP32")


def test_17_clipping_twice_is_an_error(tmp_path: Path) -> None:
    """A callback that clips as well ends a stock run. Ours divides once, however often somebody asks."""

    class ClipsToo(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kwargs["optimizer"].scaler.unscale_(kwargs["optimizer"].optimizer)
            torch.nn.utils.clip_grad_norm_(kwargs["model"].parameters(), 0.01)

    with pytest.raises(RuntimeError, match="unscale_\\(\\) has already been called"):
        stock_scaled(tmp_path, ClipsToo()).train()
    callback = MixedPrecisionCallback({"init_scale": 1024.0})
    ours = regression_trainer(tmp_path, callback, ClipsToo(), fp16=True)
    ours.train()
    assert callback.session.metrics()["applied_steps"] == 6


def test_18_a_step_without_gradients_is_an_error(tmp_path: Path) -> None:
    """A batch that reaches no parameter ends a stock run. With ours the step is taken, and there is nothing to take."""

    def constant(outputs: Any, labels: Any, **kwargs: Any) -> torch.Tensor:
        return torch.ones((), requires_grad=True) * 1.0

    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        stock_scaled(tmp_path, compute_loss_func=constant).train()
    callback = MixedPrecisionCallback()
    regression_trainer(tmp_path, callback, compute_loss_func=constant, fp16=True).train()
    assert callback.session.metrics()["applied_steps"] == 6
    assert events_of(callback._trainer, EventKind.ZERO_GRADIENTS) == []


def test_20_a_t5_is_nan_in_fp16_whatever_the_scale(tmp_path: Path) -> None:
    """Stock skips every step of a T5 whose feed-forward layer writes beyond 65504. Ours runs that layer in FP32."""
    example = runpy.run_path(str(EXAMPLES / "trainer_seq2seq_overflow.py"))
    options = SimpleNamespace(model_name_or_path=None, block_size=16)

    def trainer(name: str, *callbacks: Any) -> Trainer:
        model, _ = example["model_and_tokenizer"](options)
        given = arguments(tmp_path / name, logging_nan_inf_filter=False, optim="adamw_torch")
        return Trainer(model, given, train_dataset=example["data"](options, None), callbacks=list(callbacks))

    stock = StockFP16OnCPU()
    stock.trainer = trainer("stock", stock)
    remove = ForwardContext(EmulatedPrecision).install(stock.trainer.model)
    before = parameters_of(stock.trainer)
    stock.trainer.train()
    remove()
    assert torch.tensor(logged(stock.trainer, "loss")).isnan().all()
    assert all(torch.equal(a, b) for a, b in zip(before, parameters_of(stock.trainer), strict=True))
    callback = MixedPrecisionCallback()
    ours = trainer("ours", callback)
    ours.train()
    figures = callback.session.metrics()
    assert (figures["applied_steps"], figures["skipped_steps_activation"]) == (5, 1)
    assert dict(callback.session.plan.modules) == {example["LARGE"]: PrecisionMode.FP32}
    assert torch.tensor(logged(ours, "loss")[1:]).isfinite().all()


def test_21_a_short_run_is_spent_on_finding_the_scale(tmp_path: Path) -> None:
    """Where the scale must be 2^7, stock applies 3 of 12 steps. Ours starts where it is told, or finds it sooner."""

    def large(outputs: Any, labels: Any, **kwargs: Any) -> torch.Tensor:
        return (outputs["logits"] - labels).square().mean() * 2.0**9

    applied = []
    for callback in (
        demo_training.StockFP16OnCPU(emulate=True),
        MixedPrecisionCallback({"init_scale": 2.0**6}),
        MixedPrecisionCallback({"scaling_strategy": "ADAPTIVE"}),
    ):
        options = {"fp16": True, "max_steps": 12, "optim": "sgd", "learning_rate": 1e-3}
        witness = Witness()
        trainer = regression_trainer(tmp_path, callback, witness, compute_loss_func=large, **options)
        witness.trainer = trainer
        trainer.train()
        applied.append(witness.moved.count(True))
    stock, reported, adaptive = applied
    assert reported == 12
    assert stock <= 4 < adaptive


def test_22_an_early_skip_is_taken_for_disaster(tmp_path: Path) -> None:
    """Stock logs grad_norm nan or inf and not a word. Ours leaves it out and says that this is normal."""
    stock = stock_scaled(tmp_path, OverflowAt(1))
    stock.train()
    assert not torch.tensor(logged(stock, "grad_norm")[0]).isfinite()
    ours = regression_trainer(tmp_path, MixedPrecisionCallback(), OverflowAt(1), fp16=True)
    ours.train()
    assert logged(ours, "grad_norm")[0] is None
    assert "Normal in the first steps" in events_of(ours, EventKind.STEP_SKIPPED)[0].message


@pytest.mark.parametrize("fp16", [False, True], ids=["fp32", "fp16"])
def test_23_every_label_is_ignored(tmp_path: Path, fp16: bool) -> None:
    """Stock logs loss 0.0 and grad_norm 0.0 for ever. Ours says in the first step that it is the labels, and stops."""
    from datasets import Dataset

    rows = text()["input_ids"]
    blank = Dataset.from_dict({"input_ids": rows, "labels": [[-100] * 32] * len(rows)})
    stock = Trainer(tiny_gpt2(), arguments(tmp_path, fp16=fp16), train_dataset=blank)
    stock.train()
    assert logged(stock, "loss") == logged(stock, "grad_norm") == [0.0] * 6
    callback = MixedPrecisionCallback({"patience": 3, "stop_when_stalled": True})
    ours = Trainer(tiny_gpt2(), arguments(tmp_path, fp16=fp16), train_dataset=blank, callbacks=[callback])
    ours.train()
    (first,) = events_of(ours, EventKind.ZERO_GRADIENTS)
    assert (first.step, first.cause) == (1, Cause.LOSS)
    assert "-100" in first.message
    (stalled,) = events_of(ours, EventKind.STALLED)
    assert (stalled.step, stalled.cause, ours.state.global_step) == (3, Cause.LOSS, 3)


def test_24_fp16_on_a_cpu_is_silently_fp32(tmp_path: Path) -> None:
    """Stock's fp16=True trains the bits of FP32, without a scaler or a word. Ours is FP16, within a percent of FP32's
    loss, and what ran is named."""

    def run(*callbacks: Any, fp16: bool) -> Trainer:
        set_seed(0)
        trainer = Trainer(tiny_gpt2(), arguments(tmp_path, fp16=fp16), train_dataset=text(), callbacks=list(callbacks))
        trainer.train()
        return trainer

    fp32, stock = run(fp16=False), run(fp16=True)
    assert (stock.accelerator.mixed_precision, stock.accelerator.scaler) == ("fp16", None)
    assert all(torch.equal(a, b) for a, b in zip(parameters_of(fp32), parameters_of(stock), strict=True))
    callback = MixedPrecisionCallback()
    ours = run(callback, fp16=True)
    assert logged(ours, "loss") != logged(fp32, "loss")
    assert logged(ours, "loss") == pytest.approx(logged(fp32, "loss"), rel=1e-2)
    assert "FP16 emulated on the CPU" in callback.session.describe()


def test_26_trainer_state_is_no_json(tmp_path: Path) -> None:
    """Stock writes bare NaN and Infinity. Ours writes null, and keeps what was measured in memory."""
    options = {
        "nan_rows": tuple(range(64)), "logging_nan_inf_filter": False, "max_steps": 2, "save_strategy": "steps",
        "eval_strategy": "steps", "eval_steps": 2, "eval_dataset": numbers(tuple(range(64))), "save_steps": 2,
        "metric_for_best_model": "loss",
    }  # fmt: skip
    stock, ours = stock_and_ours(tmp_path, **options)
    with pytest.raises(ValueError, match=r"NaN|Infinity"):
        strict_json(tmp_path / "stock" / "checkpoint-2" / "trainer_state.json")
    saved = strict_json(tmp_path / "ours" / "checkpoint-2" / "trainer_state.json")
    assert saved["log_history"][0]["loss"] is None
    assert saved["best_metric"] is None
    assert torch.tensor(logged(ours, "loss")).isnan().all()
    ours.state.save_to_json(str(tmp_path / "again.json"))
    assert strict_json(tmp_path / "again.json")["log_history"]
    assert stock.state.log_history[0]["loss"] != stock.state.log_history[0]["loss"]
