"""The runs of `hf-amp demo`: a model that overflows FP16, and a stock Trainer with hf_amp or without."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import AutocastKwargs
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

BLOCK_BYTES = 128
BATCH_SIZE = 8
HELD_OUT_BLOCKS = 32
LEARNING_RATE = 2e-3
SEED = 0
STREAM_FACTOR = 2.0**21
"""Large enough that all that writes to the stream leaves FP16's range (65504) at once; a power of two rounds nothing."""
_MODES = {"fp16": PrecisionMode.MIXED, "bf16": PrecisionMode.BF16, "fp32": PrecisionMode.FP32}


def train(
    precision: str,
    config: MixedPrecisionConfig | None,
    steps: int,
    output_dir: Path,
    on_step: Callable[[int, float | None], None] = lambda step, loss: None,
    emulate: bool = True,
) -> dict[str, str]:
    """One run of a stock Trainer in `precision` ("fp16", "bf16" or "fp32"), with hf_amp where there is a `config`.

    Returns facts for the table by name. `on_step` gets the number of every optimizer step and the newest logged loss;
    `emulate` is for FP16 without hf_amp on a CPU.
    """
    set_seed(SEED)
    model, blocks = small_gpt2(), text_blocks()
    text, held_out = blocks[:-HELD_OUT_BLOCKS], blocks[-HELD_OUT_BLOCKS:]
    untrained = held_out_loss(model, held_out)
    timer = StepTimer(on_step)
    ours = MixedPrecisionCallback(config) if config else None
    stock = [StockFP16OnCPU(emulate)] if precision == "fp16" and not torch.cuda.is_available() else []
    arguments = _arguments(precision, steps, output_dir)
    trainer = _trainer(model.train(), text, arguments, [timer, *([ours] if ours else stock)])
    trainer.train()
    session = ours.session if ours else None
    trained = held_out_loss(GPT2LMHeadModel.from_pretrained(output_dir / f"checkpoint-{steps}"), held_out)
    # AdamW counts the steps that it applies; one that was skipped on the device is taken back there.
    assert trainer.optimizer is not None
    applied = max((int(state["step"]) for state in trainer.optimizer.state.values()), default=0)
    hardware = probe(trainer.accelerator.device)
    return {
        "ran": session.describe() if session else hardware.describe(_MODES[precision], emulate),
        "held-out loss": f"{untrained:.3f} → {trained:.3f}",
        "applied steps": str(applied),
        "skipped steps": _skipped_in_words(session, steps - applied),
        "scale": _scale_in_words(session, trainer.accelerator.scaler if precision == "fp16" else None),
        "in FP32": _plan_in_words(session),
        "step time": f"{1000 * timer.step_seconds():.0f} ms" if steps > 1 else "not measured: one step only",
    }


def _skipped_in_words(session: AmpSession | None, skipped: int) -> str:
    if not skipped:
        return "0"
    if session is None:
        return f"{skipped}, no cause given"
    return ", ".join(f"{count} {cause}" for cause, count in session.monitor.skipped_by_cause.items())


def _scale_in_words(session: AmpSession | None, scaler: Any) -> str:
    strategy = f" ({session.config.scaling_strategy.value})" if session is not None else ""
    if scaler is not None:
        return f"{scaler.get_scale():g}{strategy}"
    return "none: only FP16 is scaled; non-finite steps are skipped all the same" if strategy else "none"


def _plan_in_words(session: AmpSession | None) -> str:
    if session is None:
        return "no plan"
    if session.plan.default is PrecisionMode.FP32:
        return "the whole model"
    return "\n".join(name for name, mode in session.plan.modules.items() if mode is PrecisionMode.FP32) or "nothing"


def _trainer(
    model: GPT2LMHeadModel, text: list[list[int]], arguments: TrainingArguments, callbacks: list[TrainerCallback]
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
    dataset: Any = [{"input_ids": block, "labels": block} for block in text]
    trainer = Trainer(model, arguments, train_dataset=dataset, callbacks=callbacks, optimizers=(optimizer, None))
    trainer.pop_callback(PrinterCallback)
    return trainer


def _arguments(precision: str, steps: int, output_dir: Path) -> TrainingArguments:
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
        logging_nan_inf_filter=False,  # which logs a loss of 0 for NaN
        save_strategy="steps",
        save_steps=steps,
        report_to="tensorboard",
        disable_tqdm=True,
        log_level="error",
        seed=SEED,
    )


@torch.no_grad()
def held_out_loss(model: GPT2LMHeadModel, blocks: list[list[int]]) -> float:
    """Mean loss on `blocks` in FP32 on the CPU, in nats a byte, whatever precision the model was trained in."""
    ids = torch.tensor(blocks)
    model.train(False)
    return float(model.cpu()(input_ids=ids, labels=ids).loss)


class StepTimer(TrainerCallback):
    """Reports every step to `on_step(step, newest loss)`, and times all but the first, which warms up."""

    def __init__(self, on_step: Callable[[int, float | None], None]) -> None:
        self._on_step = on_step
        self._ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ends.append(time.perf_counter())
        self._on_step(state.global_step, state.log_history[-1].get("loss") if state.log_history else None)

    def step_seconds(self) -> float:
        """The lower quartile, which other programs on the machine hardly change."""
        return sorted(end - start for start, end in itertools.pairwise(self._ends))[(len(self._ends) - 1) // 4]


MOST_STEPS, FEWEST_STEPS = 120, 20
MOST_SECONDS = 120.0
"""What all runs may take together, about, where nobody asks for a number of steps."""


def affordable_steps(runs: int) -> int:
    """Steps of each of so many runs, by how long three forward and backward passes take in FP32."""
    model, ids = small_gpt2(), torch.tensor(text_blocks()[:BATCH_SIZE])
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        seconds.append(time.perf_counter() - began)
    overhead = 2  # the optimizer, the Trainer, emulation
    return int(min(max(MOST_SECONDS / (runs * overhead * min(seconds)), FEWEST_STEPS), MOST_STEPS))


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
