"""Kernels that one step boundary launches on a device, counted by PyTorch's profiler: stock's and each strategy's, for GPT-2's gradients.

`tests/scaling/test_device_work.py` counts the same without a device, by rules from PyTorch's sources.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from hf_amp import AdvancedGradScaler, MixedPrecisionConfig, ScalingStrategy
from tests.scaling.test_device_work import SHAPES, SIZE_FACTOR, STEPS, clip_as_trainer, clip_by_torch, clip_in_raw_loop

Clip = Callable[[Any, torch.optim.Optimizer, list[nn.Parameter]], None]


def launches_of_steps(scaler: Any, clip: Clip, device: torch.device, factor: int) -> dict[str, dict[str, Any]]:
    """Five steps of fused AdamW, the last of them skipped: kernels, copies and clearings of those in `STEPS`."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn([size * factor for size in shape], device=device)) for shape in SHAPES]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    found = {}
    is_cuda = device.type == "cuda"  # a CPU launches none, and is not looked at
    for step in range(5):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter) * (math.nan if step == STEPS["skipped"] else 100.0)
        loss = torch.tensor(2.0, device=device)
        if is_cuda:
            torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) if is_cuda else nullcontext() as seen:
            scaler.scale(loss)
            clip(scaler, optimizer, parameters)
            scaler.step(optimizer)
            scaler.update()
            if is_cuda:
                torch.cuda.synchronize()
        names = [event.name for event in seen.events() if event.device_type == DeviceType.CUDA] if is_cuda else []
        moved = [name for name in names if name.startswith(("Memcpy", "Memset"))]
        kernels = Counter(name[:60] for name in names if not name.startswith(("Memcpy", "Memset")))
        for what, number in STEPS.items():
            if number == step:
                found[what] = {
                    "kernels": kernels.total(),
                    "copies": dict(Counter(moved)),
                    "most": dict(kernels.most_common(8)),
                }
    return found


def measure_launches(device: torch.device, factor: int = SIZE_FACTOR) -> dict[str, Any]:
    """Of every way to clip, for stock and for every strategy."""
    found: dict[str, Any] = {
        "stock": launches_of_steps(torch.amp.GradScaler(device.type), clip_by_torch, device, factor)
    }
    for strategy in ScalingStrategy:
        for clip in (clip_as_trainer, clip_in_raw_loop, clip_by_torch):
            config = MixedPrecisionConfig(scaling_strategy=strategy, monitoring_interval=3)
            scaler = AdvancedGradScaler(config, device.type)
            found[f"{strategy.value}, {clip.__name__}"] = launches_of_steps(scaler, clip, device, factor)
            scaler.flush()
    return found
