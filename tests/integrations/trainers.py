"""Real Trainers on tiny models and real text, for the tests of the callback."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_amp.cli.demo_training import help_topics

POISONED_STEP = 3


@cache
def text() -> Dataset:
    """The first 256 blocks of the help topics, 32 bytes each."""
    blocks = [row[:32] for row in help_topics()["input_ids"][:256]]
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks})


def tiny_gpt2() -> GPT2LMHeadModel:
    """One layer of width 16 over bytes, without dropout."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256, n_positions=32, n_embd=16, n_layer=1, n_head=2,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    """FP16 on the CPU, six steps, a log entry each, nothing saved, no reporter; changed by `options`."""
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
    return TrainingArguments(str(folder), **{**defaults, **options})


class OverflowAt(TrainerCallback):
    """Makes the gradients of the given optimizer steps (from 1) inf, by a gradient hook on one parameter."""

    def __init__(self, *steps: int) -> None:
        self._steps = steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 in self._steps:
            parameter = kwargs["model"].transformer.h[0].mlp.c_fc.weight
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
        tiny_gpt2(),
        arguments(folder, **options),
        train_dataset=text(),
        callbacks=[*callbacks, witness],
    )
    witness.trainer = trainer
    return trainer, witness
