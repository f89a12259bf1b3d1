"""The runs of `hf-amp demo`: a model that overflows FP16, a stock Trainer with hf_amp or without, and the table of results."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import AutocastKwargs
from rich.table import Table
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
from hf_amp.device import probe
from hf_amp.emulation import EmulatedPrecision
from hf_amp.fallback.module_precision import ForwardContext
from hf_amp.integrations.transformers import MixedPrecisionCallback, calling_trainer
from hf_amp.precision import PrecisionMode
from hf_amp.session import AmpSession

if TYPE_CHECKING:
    from datasets import Dataset

BLOCK_BYTES = 128
BATCH_SIZE = 8
HELD_OUT_BLOCKS = 32
LEARNING_RATE = 2e-3
STREAM_FACTOR = 2.0**21
"""Large enough that all that writes to the stream leaves FP16's range (65504) at once; a power of two rounds nothing."""


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


def train(
    precision: str,
    config: MixedPrecisionConfig | None,
    steps: int,
    seed: int,
    output_dir: Path,
    on_step: Callable[[int, float | None], None] = lambda step, loss: None,
    emulate: bool = True,
) -> DemoResult:
    """One run of a stock Trainer in `precision` ("fp16", "bf16" or "fp32"), with hf_amp where there is a `config`.

    `on_step` gets the number of every optimizer step and the newest logged loss; `emulate` is for FP16 without hf_amp on a CPU.
    """
    set_seed(seed)
    model, text = small_gpt2(), help_topics()
    held_out = text.select(range(len(text) - HELD_OUT_BLOCKS, len(text)))
    untrained = held_out_loss(model, held_out)
    timer = StepTimer(on_step)
    ours = MixedPrecisionCallback(config) if config else None
    stock = [StockFP16OnCPU(emulate)] if precision == "fp16" and not torch.cuda.is_available() else []
    callbacks = [timer, *([ours] if ours else stock)]
    training_text = text.select(range(len(text) - HELD_OUT_BLOCKS))
    trainer = _trainer(model.train(), training_text, _arguments(precision, steps, seed, output_dir), callbacks)
    trainer.train()
    session = ours.session if ours else None
    checkpoint = output_dir / f"checkpoint-{steps}"
    return DemoResult(
        ran=session.describe() if session else _what_ran(trainer, precision, emulate),
        losses=[(int(log["step"]), log["loss"]) for log in trainer.state.log_history if "loss" in log],
        held_out_losses=(untrained, held_out_loss(GPT2LMHeadModel.from_pretrained(checkpoint), held_out)),
        applied_steps=_applied_steps(trainer),
        scale=trainer.accelerator.scaler.get_scale() if precision == "fp16" else None,
        step_seconds=timer.step_seconds,
        session=session,
        checkpoint=checkpoint,
    )


def _trainer(
    model: GPT2LMHeadModel, text: Dataset, arguments: TrainingArguments, callbacks: list[TrainerCallback]
) -> Trainer:
    # A parameter times c has gradients divided by c, and must move c times as far: the model learns what a plain one would.
    groups = [
        {
            "params": [p for name, p in model.named_parameters() if _writes_to_the_stream(name) is scaled],
            "lr": LEARNING_RATE * factor, "eps": 1e-8 / factor, "weight_decay": 0.0,
        }
        for scaled, factor in ((False, 1.0), (True, STREAM_FACTOR))
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, fused=True)
    trainer = Trainer(model, arguments, train_dataset=text, callbacks=callbacks, optimizers=(optimizer, None))
    trainer.pop_callback(PrinterCallback)
    return trainer


def _applied_steps(trainer: Trainer) -> int:
    """AdamW counts the steps that it applies; one that was skipped on the device is taken back there."""
    assert trainer.optimizer is not None
    return max((int(state["step"]) for state in trainer.optimizer.state.values()), default=0)


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


def _what_ran(trainer: Trainer, precision: str, emulate: bool) -> str:
    hardware = probe(trainer.accelerator.device)
    if precision == "fp16":
        return hardware.describe_fp16(emulate)
    return f"{precision.upper()} on {hardware.name}"


@torch.no_grad()
def held_out_loss(model: GPT2LMHeadModel, blocks: Dataset) -> float:
    """Mean loss on `blocks` in FP32 on the CPU, in nats a byte, whatever precision the model was trained in."""
    ids = torch.tensor(blocks["input_ids"][:])
    model.train(False)
    return float(model.cpu()(input_ids=ids, labels=ids).loss)


class StepTimer(TrainerCallback):
    """Reports every step to `on_step(step, newest loss)`, and times all but the first, which warms up."""

    def __init__(self, on_step: Callable[[int, float | None], None]) -> None:
        self._on_step = on_step
        self._loss: float | None = None
        self._first_end = 0.0
        self.step_seconds = math.nan

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._loss = kwargs["logs"].get("loss", self._loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        if state.global_step == 1:
            self._first_end = now
        else:
            self.step_seconds = (now - self._first_end) / (state.global_step - 1)
        self._on_step(state.global_step, self._loss)


class StockFP16OnCPU(TrainerCallback):
    """Gives a Trainer's accelerator the stock `torch.amp.GradScaler` and FP16, as it would have them on a GPU.

    Args:
        emulate: round FP32 arithmetic to FP16; else accelerate's own autocast runs the CPU's half kernels.
    """

    def __init__(self, emulate: bool) -> None:
        self._emulate = emulate

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        accelerator = calling_trainer(self).accelerator
        accelerator.scaler = torch.amp.GradScaler("cpu")
        if self._emulate:
            accelerator.autocast_handler = AutocastKwargs(enabled=False)
            ForwardContext(EmulatedPrecision).install(kwargs["model"])
        else:
            accelerator.native_amp = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Later than prepare(), which would put the model inside of an autocast that is off, and so keep emulation out.
        calling_trainer(self).accelerator.native_amp = True


def text_blocks() -> list[list[int]]:
    """About 700 kB of English, which comes with Python, in blocks of 128 bytes."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    return [list(text[i : i + BLOCK_BYTES]) for i in range(0, len(text) - BLOCK_BYTES, BLOCK_BYTES)]


def help_topics() -> Dataset:
    """The same as a data set: columns `input_ids` and `labels`, each a list of 128 ints."""
    from datasets import Dataset

    blocks = text_blocks()
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks})


def small_gpt2(factor: float = STREAM_FACTOR) -> GPT2LMHeadModel:
    """A GPT-2 of 0.21M parameters over single bytes; its function is the same for every `factor` of its stream."""
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256, n_positions=BLOCK_BYTES, n_embd=96, n_layer=2, n_head=4, n_inner=192,
            initializer_range=0.08, layer_norm_epsilon=1e-5 * factor**2, tie_word_embeddings=False,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(factor if _writes_to_the_stream(name) else 1.0)
    return model


def _writes_to_the_stream(name: str) -> bool:
    """Whether the GPT-2 parameter of this name writes to the residual stream; the norms that read it undo a factor on it."""
    return re.fullmatch(r"transformer\.w[tp]e\.weight|.*\.c_proj\.(weight|bias)", name) is not None


LONGEST_NAME = 27
"""Characters of `transformer.h.0.attn.c_proj`, which is not to be broken on a terminal of 80 columns."""


def table_of(results: Mapping[str, DemoResult], steps: int) -> Table:
    """Runs side by side.

    Args:
        results: heading → run.
        steps: optimizer steps that each run was to make.
    """
    table = Table("", title="hf-amp demo", show_lines=True)
    for heading, run in results.items():
        names_modules = run.session is not None and run.session.plan.modules
        table.add_column(heading, width=LONGEST_NAME if names_modules else None)
    rows: dict[str, Callable[[DemoResult], str]] = {
        "ran": lambda run: run.ran,
        "held-out loss": lambda run: "{:.3f} → {:.3f}".format(*run.held_out_losses),
        "applied steps": lambda run: str(run.applied_steps),
        "skipped steps": lambda run: _skipped(run, steps),
        "scale": _scale,
        "in FP32": _in_fp32,
        "step time": lambda run: f"{1000 * run.step_seconds:.0f} ms" if steps > 1 else "not measured: one step only",
    }  # fmt: skip
    for name, cell in rows.items():
        table.add_row(name, *map(cell, results.values()))
    return table


def _skipped(run: DemoResult, steps: int) -> str:
    if run.session is None:
        skipped = steps - run.applied_steps
        return f"{skipped}, no cause given" if skipped else "0"
    causes = [
        f"{value:g} {name.removeprefix('skipped_steps_').upper()}"
        for name, value in run.session.metrics().items()
        if name.startswith("skipped_steps_")
    ]
    return ", ".join(causes) or "0"


def _scale(run: DemoResult) -> str:
    strategy = f" ({run.session.config.scaling_strategy.value})" if run.session is not None else ""
    if run.scale is not None:
        return f"{run.scale:g}{strategy}"
    return "none: only FP16 is scaled; non-finite steps are skipped all the same" if strategy else "none"


def _in_fp32(run: DemoResult) -> str:
    """What the plan says, where there is one."""
    if run.session is None:
        return "no plan"
    plan = run.session.plan
    if plan.default is PrecisionMode.FP32:
        return "the whole model"
    return "\n".join(name for name, mode in plan.modules.items() if mode is PrecisionMode.FP32) or "nothing"
