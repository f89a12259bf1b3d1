"""A hyperparameter search by Optuna over learning rate, scaling strategy and half parameters, with a stock Trainer.

A small network learns scikit-learn's digits; nothing is downloaded:

    python examples/trainer_search.py --precision bf16 --trials 12

The Trainer's own pruning does: `compute_objective` reads the callback's `amp/...` metrics, and is infinite for a trial that skips
most of its steps or loses most of its updates to rounding. A trial has a session of its own, which the next one ends.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import optuna
import torch
from datasets import Dataset
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, set_seed

from hf_amp import MixedPrecisionCallback, MixedPrecisionConfig

MOST_SKIPPED = 0.5
MOST_LOST = 0.5


class Digits(nn.Module):
    """Two layers over 64 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.output = nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.output(self.hidden(x.to(self.hidden.weight.dtype)).relu())
        return {"loss": nn.functional.cross_entropy(logits.float(), labels), "logits": logits}


def space(trial: optuna.Trial, precision: str, callback: MixedPrecisionCallback) -> dict[str, Any]:
    """One trial's choice: options of hf_amp go to the callback, the rest is TrainingArguments'."""
    half = ["upcast", "stochastic_rounding", "kahan"]
    if precision == "fp16":
        chosen = {
            "scaling_strategy": trial.suggest_categorical("scaling_strategy", ["DYNAMIC", "ADAPTIVE", "CONSTANT"]),
            "init_scale": 2.0 ** trial.suggest_int("log2_init_scale", 8, 36, step=4),
            "half_parameters": trial.suggest_categorical("half_parameters", [*half, "master_weights"]),
        }
    else:
        chosen = {"half_parameters": trial.suggest_categorical("half_parameters", ["as they are", *half])}
    options = {name: value for name, value in chosen.items() if value != "as they are"}
    callback.config = MixedPrecisionConfig(**options)  # for the session that this trial begins with
    return {"learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True)}


def search(precision: str, trials: int, steps: int, folder: Path) -> optuna.Study:
    """The study, with what each trial's precision did in its user attributes."""
    digits = load_digits()
    rows = Dataset.from_dict({"x": (digits.data / 16).astype("float32"), "labels": digits.target}).with_format("torch")
    split = rows.train_test_split(0.2, seed=0)
    callback, seen = MixedPrecisionCallback(), list[optuna.Trial]()

    def hp_space(trial: optuna.Trial) -> dict[str, Any]:
        seen.append(trial)
        return space(trial, precision, callback)

    def model_init() -> Digits:
        set_seed(0)
        return Digits().to(torch.float16 if precision == "fp16" else torch.bfloat16)

    def objective(metrics: dict[str, float]) -> float:
        assert callback.session is not None
        amp = callback.session.metrics()
        decided = amp["applied_steps"] + amp["skipped_steps"]
        skipped, lost = amp["skipped_steps"] / max(decided, 1), amp.get("lost_update_fraction", 0.0)
        for name, share in (("skipped", skipped), ("lost updates", lost)):
            seen[-1].set_user_attr(name, round(share, 3))
        return math.inf if skipped > MOST_SKIPPED or lost > MOST_LOST else metrics["eval_loss"]

    trainer = Trainer(
        model_init=model_init,
        args=TrainingArguments(
            str(folder), fp16=precision == "fp16", bf16=precision == "bf16", use_cpu=True, max_steps=steps, eval_strategy="steps", eval_steps=steps // 4,
            per_device_train_batch_size=32, per_device_eval_batch_size=360, logging_steps=steps, save_strategy="no",
            report_to="none", disable_tqdm=True,
        ),
        train_dataset=split["train"],
        eval_dataset=split["test"],
        callbacks=[callback],
    )  # fmt: skip
    trainer.hyperparameter_search(
        hp_space, compute_objective=objective, n_trials=trials, direction="minimize", backend="optuna",
        sampler=optuna.samplers.TPESampler(seed=0), pruner=optuna.pruners.ThresholdPruner(upper=1e6),
    )  # fmt: skip
    if callback.session is not None:
        callback.session.detach()
    return seen[0].study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--precision", choices=["fp16", "bf16"], default="fp16", help="of all trials: a process has one"
    )
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/trainer_search"))
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = search(options.precision, options.trials, options.steps, options.output_dir)
    for trial in study.trials:
        value = "pruned" if trial.state is optuna.trial.TrialState.PRUNED else f"loss {trial.value:.3f}"
        print(f"trial {trial.number}: {value}, {trial.user_attrs}, {trial.params}")
    print(f"\nbest: trial {study.best_trial.number}, loss {study.best_value:.3f}, {study.best_params}")


if __name__ == "__main__":
    main()
