"""FP16 by PyTorch's and accelerate's own means on a CPU, where accelerate would run FP32: what hf_amp is shown beside."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import AutocastKwargs
from transformers import TrainerCallback

from hf_amp.emulation import EmulatedPrecision
from hf_amp.forward_context import ForwardContext
from hf_amp.integrations.transformers import calling_trainer


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
