"""One training run of `hf-amp demo`: a stock Trainer, with hf_amp or without."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GPT2LMHeadModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_amp.cli.demo_model import STREAM_FACTOR, held_out_loss, help_topics, residual_stream, small_gpt2
from hf_amp.cli.stock_fp16 import StockFP16OnCPU
from hf_amp.config import MixedPrecisionConfig
from hf_amp.hardware import probe
from hf_amp.integrations.transformers import MixedPrecisionCallback
from hf_amp.session import AmpSession

BATCH_SIZE = 8
LEARNING_RATE = 2e-3
HELD_OUT_BLOCKS = 32


@dataclass(frozen=True)
class DemoResult:
    """What a demo run gave.

    Attributes:
        ran: one phrase: the precision, and what that means on this device.
        losses: (optimizer step, training loss) as the Trainer logged them.
        held_out_losses: before and after training, on text that was not trained on, in FP32; nats a byte.
        applied_steps: optimizer steps that the optimizer itself has counted.
        scale: loss scale at the end; None where nothing is scaled.
        step_seconds: mean wall-clock time of an optimizer step, the first excepted.
        session: the session of the callback; None without hf_amp.
        checkpoint: folder of the last checkpoint.
    """

    ran: str
    losses: list[tuple[int, float]]
    held_out_losses: tuple[float, float]
    applied_steps: int
    scale: float | None
    step_seconds: float
    session: AmpSession | None
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


def train(
    precision: str,
    config: MixedPrecisionConfig | None,
    steps: int,
    seed: int,
    output_dir: Path,
    on_step: Callable[[int, float | None], None] = lambda step, loss: None,
    emulate: bool = True,
) -> DemoResult:
    """One run of a stock Trainer.

    Args:
        precision: "fp16", "bf16" or "fp32".
        config: of hf_amp; None trains without it.
        on_step: called after every optimizer step with its number and the newest logged loss.
        emulate: whether FP16 without hf_amp is emulated on a CPU.
    """
    set_seed(seed)
    model, text = small_gpt2(), help_topics()
    first_held_out = len(text) - HELD_OUT_BLOCKS
    held_out = text.select(range(first_held_out, len(text)))
    untrained = held_out_loss(model, held_out)
    ours = MixedPrecisionCallback(config) if config is not None else None
    timer = StepTimer(on_step)
    callbacks: list[TrainerCallback] = [timer]
    if ours is not None:
        callbacks.append(ours)
    elif precision == "fp16" and not torch.cuda.is_available():
        callbacks.append(StockFP16OnCPU(emulate))
    # The rates go with the factors of the parameters, and so the model learns what a plain one would.
    groups = residual_stream(STREAM_FACTOR).parameter_groups(model, LEARNING_RATE)
    trainer = Trainer(
        model.train(),
        _arguments(precision, steps, seed, output_dir),
        train_dataset=text.select(range(first_held_out)),
        callbacks=callbacks,
        optimizers=(torch.optim.AdamW(groups, fused=True), None),
    )
    trainer.pop_callback(PrinterCallback)
    trainer.train()
    session = ours.session if ours is not None else None
    checkpoint = output_dir / f"checkpoint-{steps}"
    return DemoResult(
        ran=session.what_runs() if session is not None else _what_ran(trainer, precision, emulate),
        losses=[
            (int(entry["step"]), entry["loss"]) for entry in trainer.state.log_history if "loss" in entry
        ],
        held_out_losses=(untrained, held_out_loss(GPT2LMHeadModel.from_pretrained(checkpoint), held_out)),
        applied_steps=_applied_steps(trainer),
        scale=trainer.accelerator.scaler.get_scale() if precision == "fp16" else None,
        step_seconds=timer.step_seconds,
        session=session,
        checkpoint=checkpoint,
    )


def _arguments(precision: str, steps: int, seed: int, output_dir: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=BATCH_SIZE,
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


def _applied_steps(trainer: Trainer) -> int:
    """AdamW counts the steps that it applies; one that was skipped on the device is taken back there."""
    assert trainer.optimizer is not None
    return max((int(state["step"]) for state in trainer.optimizer.state.values()), default=0)


def _what_ran(trainer: Trainer, precision: str, emulate: bool) -> str:
    hardware = probe(trainer.accelerator.device)
    return (
        hardware.describe_fp16(emulate) if precision == "fp16" else f"{precision.upper()} on {hardware.name}"
    )
