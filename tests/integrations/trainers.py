"""Real Trainers on tiny models and real text, for the tests of the callback."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_amp.cli.demo_training import text_blocks
from hf_amp.integrations._compat import replace_scaler

if TYPE_CHECKING:
    from datasets import Dataset

POISONED_STEP = 3


@cache
def text_rows() -> list[dict[str, list[int]]]:
    """The first 256 blocks of the help topics, 32 bytes each, as any map-style data set gives them."""
    return [{"input_ids": block[:32], "labels": block[:32]} for block in text_blocks()[:256]]


@cache
def text() -> Dataset:
    """The same as a data set of `datasets`."""
    from datasets import Dataset

    return Dataset.from_list(text_rows())


def tiny_gpt2() -> GPT2LMHeadModel:
    """One layer of width 16 over bytes, without dropout."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256, n_positions=32, n_embd=16, n_layer=1, n_head=2,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def arguments(folder: Path, of: type = TrainingArguments, **options: Any) -> Any:
    """FP16 on the CPU, six steps, a log entry each, nothing saved, no reporter; changed by `options`. `of`: their class."""
    defaults: dict[str, Any] = {
        "fp16": True,
        "use_cpu": True,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
    }
    return of(str(folder), **{**defaults, **options})


class Regression(nn.Module):
    """Two layers over 4 floats; `labels` is a float. Small, fast, and takes NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.output = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        y = self.output(torch.tanh(self.hidden(x))).squeeze(-1)
        if labels is None:
            return {"logits": y}
        return {"loss": (y - labels).square().mean(), "logits": y}


def numbers(nan_rows: tuple[int, ...] = ()) -> Dataset:
    """64 rows of 4 floats, of which `nan_rows` hold NaN, and their sums."""
    from datasets import Dataset

    x = torch.rand(64, 4, generator=torch.Generator().manual_seed(0)) - 0.5
    labels = x.sum(1).tolist()
    x[list(nan_rows)] = torch.nan
    return Dataset.from_dict({"x": x.tolist(), "labels": labels})


def regression_trainer(folder: Path, *callbacks: Any, nan_rows: tuple[int, ...] = (), **options: Any) -> Trainer:
    """A stock Trainer on `numbers`, four rows a batch in order; FP32 unless `options` say otherwise."""
    names = ("compute_loss_func", "compute_metrics", "eval_dataset")
    given = {name: options.pop(name) for name in names if name in options}
    set_seed(0)
    return Trainer(
        Regression(),
        arguments(folder, **{"fp16": False, "train_sampling_strategy": "sequential", **options}),
        train_dataset=numbers(nan_rows),
        callbacks=list(callbacks),
        **given,
    )


def logged(trainer: Trainer, key: str) -> list[Any]:
    """What the training entries of the log hold under `key`; None where it is absent."""
    return [entry.get(key) for entry in trainer.state.log_history if "loss" in entry]


def parameters_of(trainer: Trainer) -> list[torch.Tensor]:
    """Copies of the model's parameters."""
    return [p.detach().clone() for p in trainer.model.parameters()]


def all_finite(trainer: Trainer) -> bool:
    """Whether every parameter is finite."""
    return all(bool(p.isfinite().all()) for p in trainer.model.parameters())


def strict_json(file: Path) -> Any:
    """What `file` holds, read as every JSON parser but Python's reads it: NaN and Infinity are errors."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} in {file}")

    return json.loads(file.read_text(), parse_constant=refuse)


class StockFP16OnCPU(TrainerCallback):
    """What accelerate would do on a CPU if it scaled there: its own classes, the stock scaler."""

    def __init__(self, **scaler_options: Any) -> None:
        self.scaler = torch.amp.GradScaler("cpu", **scaler_options)
        self.trainer: Trainer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        replace_scaler(kwargs["optimizer"], self.scaler)
        self.trainer.accelerator.scaler = self.scaler
        self.trainer.accelerator.native_amp = True


class OverflowAt(TrainerCallback):
    """Makes the gradients of the given optimizer steps (from 1) inf, by a gradient hook on one parameter."""

    def __init__(self, *steps: int) -> None:
        self._steps = steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 in self._steps:
            parameter = next(p for p in kwargs["model"].parameters() if p.requires_grad)
            handle = parameter.register_hook(lambda gradient: gradient * torch.inf)
            self._handle = handle

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if hasattr(self, "_handle"):
            self._handle.remove()
            del self._handle


class Witness(TrainerCallback):
    """Notes, around every optimizer step, what moved."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.moved: list[bool] = []
        self.state_moved: list[bool] = []
        self.skipped: list[bool] = []
        self.rates: list[float] = []

    def _copy(self, model: Any, optimizer: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        state = [
            value.clone()
            for entry in optimizer.state.values()
            for value in entry.values()
            if isinstance(value, torch.Tensor)
        ]
        return [p.detach().clone() for p in model.parameters()], state

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._before = self._copy(kwargs["model"], kwargs["optimizer"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        after = self._copy(kwargs["model"], kwargs["optimizer"])
        same = [
            len(old) == len(new) and all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
            for old, new in zip(self._before, after, strict=True)
        ]
        self.moved.append(not same[0])
        self.state_moved.append(not same[1])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        self.skipped.append(self.trainer.accelerator.optimizer_step_was_skipped)
        self.rates.append(kwargs["lr_scheduler"].get_last_lr()[0])


def trainer_with(folder: Path, *callbacks: Any, seed: int = 0, **options: Any) -> tuple[Trainer, Witness]:
    """A stock Trainer on the tiny GPT-2, with a witness."""
    set_seed(seed)
    witness = Witness()
    trainer = Trainer(
        tiny_gpt2(), arguments(folder, **options), train_dataset=text_rows(), callbacks=[*callbacks, witness]
    )
    witness.trainer = trainer
    return trainer, witness
