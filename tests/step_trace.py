"""How a healthy Trainer step reads: through which files of hf_amp it goes, in which order.

    python -m tests.step_trace

prints file after file with the functions that were entered, comprehensions included. The step is the fifth of a stock Trainer
in FP16 with fused AdamW and the callback at its defaults. Frames of the emulation, and what it calls, are left out: a device
has none.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import hf_amp
from hf_amp import MixedPrecisionCallback

PACKAGE = Path(hf_amp.__file__).parent
STEP = 5


class TraceOneStep(TrainerCallback):
    """Notes (file, function) of every frame of hf_amp that is entered from the beginning to the end of one step."""

    def __init__(self) -> None:
        self.entered: list[tuple[str, str]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == STEP:
            sys.setprofile(self._note)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or not _is_ours(frame):
            return
        caller: FrameType | None = frame
        while caller is not None:
            at = Path(caller.f_code.co_filename).relative_to(PACKAGE).as_posix() if _is_ours(caller) else ""
            # The latter gives FP32 outputs, as accelerate does by itself on a device.
            if at == "emulation.py" or (at, caller.f_code.co_name) == ("integrations/accelerate.py", "__call__"):
                return
            caller = caller.f_back
        file = Path(frame.f_code.co_filename).relative_to(PACKAGE).as_posix()
        self.entered.append((file, frame.f_code.co_name))


def _is_ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(str(PACKAGE))


def traced_step() -> list[tuple[str, list[str]]]:
    """(file, functions entered there one after the other), a new entry for every change of file."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    rows = [{"input_ids": torch.arange(16), "labels": torch.arange(16)} for _ in range(32)]
    trace = TraceOneStep()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, fp16=True, max_steps=STEP, per_device_train_batch_size=4, optim="adamw_torch_fused",
            report_to=[], save_strategy="no", logging_steps=100, disable_tqdm=True,
        )  # fmt: skip
        Trainer(
            GPT2LMHeadModel(config), arguments, train_dataset=rows, callbacks=[MixedPrecisionCallback(), trace]
        ).train()
    return [(file, [name for _, name in frames]) for file, frames in groupby(trace.entered, key=lambda e: e[0])]


def main() -> None:
    logging.disable(logging.WARNING)
    visits = traced_step()
    for file, functions in visits:
        print(f"{file}: {' '.join(functions)}")
    print(f"{len({file for file, _ in visits})} files, {len(visits) - 1} changes of file")


if __name__ == "__main__":
    main()
