"""What `hf-amp demo` trains: a small byte-level GPT-2 on the help topics that every CPython ships."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_amp.config import MixedPrecisionConfig
from hf_amp.integrations.transformers import MixedPrecisionCallback
from hf_amp.session import AmpSession

BLOCK_BYTES = 128
BATCH_SIZE = 16


@dataclass(frozen=True)
class DemoResult:
    """What a demo run gave.

    Attributes:
        losses: (optimizer step, training loss) as the Trainer logged them.
        step_seconds: mean wall-clock time of an optimizer step, the first excepted.
        session: the session of the callback.
        checkpoint: folder of the last checkpoint.
    """

    losses: list[tuple[int, float]]
    step_seconds: float
    session: AmpSession
    checkpoint: Path


class StepTimer(TrainerCallback):
    """Reports every step to `on_step(step, newest loss)`, and times all but the first, which warms up."""

    def __init__(self, on_step: Callable[[int, float | None], None]) -> None:
        self._on_step = on_step
        self._loss: float | None = None
        self._first_end = 0.0
        self.step_seconds = float("nan")

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._loss = kwargs["logs"].get("loss", self._loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        if state.global_step == 1:
            self._first_end = now
        else:
            self.step_seconds = (now - self._first_end) / (state.global_step - 1)
        self._on_step(state.global_step, self._loss)


def help_topics() -> Dataset:
    """About 700 kB of English in blocks of bytes: columns `input_ids` and `labels`, each a list of 128 ints."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    blocks = [list(text[i : i + BLOCK_BYTES]) for i in range(0, len(text) - BLOCK_BYTES, BLOCK_BYTES)]
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks})


def small_gpt2() -> GPT2LMHeadModel:
    """A GPT-2 of 1.04M parameters over single bytes."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256, n_positions=BLOCK_BYTES, n_embd=128, n_layer=5, n_head=4,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def train(
    precision: str,
    config: MixedPrecisionConfig,
    steps: int,
    seed: int,
    output_dir: Path,
    on_step: Callable[[int, float | None], None] = lambda step, loss: None,
) -> DemoResult:
    """One run of a stock Trainer with the callback.

    Args:
        precision: "fp16", "bf16" or "fp32".
        on_step: called after every optimizer step with its number and the newest logged loss.
    """
    set_seed(seed)
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=2e-3,
        warmup_steps=min(20, steps // 5),
        lr_scheduler_type="cosine",
        fp16=precision == "fp16",
        bf16=precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        logging_steps=max(1, min(10, steps // 10)),
        logging_first_step=True,
        save_strategy="steps",
        save_steps=steps,
        report_to="tensorboard",
        disable_tqdm=True,
        log_level="error",
        seed=seed,
    )
    callback = MixedPrecisionCallback(config)
    timer = StepTimer(on_step)
    trainer = Trainer(small_gpt2(), arguments, train_dataset=help_topics(), callbacks=[callback, timer])
    trainer.pop_callback(PrinterCallback)
    trainer.train()
    losses = [(int(entry["step"]), entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    assert callback.session is not None
    return DemoResult(losses, timer.step_seconds, callback.session, output_dir / f"checkpoint-{steps}")
