"""Lightning Fabric as a contender: its own precision plugin around the stock scaler."""

from __future__ import annotations

from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from tests.benchmarks.models import INIT_SCALE, stock_fp16

INSTALLED = find_spec("lightning_fabric") is not None
"""By the extra hf_amp[peers]."""


def fabric_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, device: str
) -> tuple[Any, nn.Module, torch.optim.Optimizer]:
    """A Fabric, and the model and optimizer that it has set up. On a CPU its forward passes run in emulated FP16."""
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.precision.amp import MixedPrecision

    class Plugin(MixedPrecision):
        def forward_context(self) -> AbstractContextManager[Any]:
            return stock_fp16(device)

    plugin = Plugin("16-mixed", device, torch.amp.GradScaler(device, init_scale=INIT_SCALE))
    fabric = Fabric(accelerator=device, devices=1, plugins=[plugin])
    return fabric, *fabric.setup(model, optimizer)
