"""How runs are scaled: hf_amp, PyTorch, and the rules of others."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_amp import AdvancedGradScaler, AmpSession, MixedPrecisionConfig, PrecisionMode
from hf_amp.device import probe
from hf_amp.emulation import EmulatedPrecision
from tests.benchmarks.quality_tasks import OUTLIER_FACTOR
from tests.benchmarks.scaling_rules import HistogramRule, HysteresisRule, LogMaxRule, Oracle, RuleScaler


@dataclass(frozen=True)
class Precision:
    """How one run is scaled, and what its forward passes run in.

    Attributes:
        is_half: whether that is FP16.
        repeats: whether a batch whose step is skipped is run again, as with `on_overflow="retry"`.
    """

    scaler: Any
    context: Callable[[], AbstractContextManager[Any]] = EmulatedPrecision
    session: AmpSession | None = None
    is_half: bool = True
    repeats: bool = False


def ours(strategy: str, repeats: bool = False, **options: Any) -> Callable[[nn.Module], Precision]:
    """hf_amp as it is by default, its fallback included, but for `options`."""

    def make(model: nn.Module) -> Precision:
        config = MixedPrecisionConfig(scaling_strategy=strategy, **options)
        session = AmpSession(config, AdvancedGradScaler(config, "cpu"), PrecisionMode.MIXED, probe("cpu"))
        session.register_model(model)
        return Precision(session.scaler, session.autocast, session, repeats=repeats)

    return make


def rule(made: Callable[[float], Any], scale: float) -> Callable[[nn.Module], Precision]:
    return lambda _: Precision(RuleScaler(made(scale), scale))


SCALINGS: dict[str, Callable[[nn.Module], Precision]] = {
    "none (FP32)": lambda _: Precision(torch.amp.GradScaler("cpu", enabled=False), nullcontext, is_half=False),
    "torch.amp.GradScaler": lambda _: Precision(torch.amp.GradScaler("cpu")),
    "hf_amp CONSTANT": ours("CONSTANT"),
    "hf_amp DYNAMIC": ours("DYNAMIC"),
    "hf_amp ADAPTIVE": ours("ADAPTIVE"),
    "hf_amp ADAPTIVE, retry": ours("ADAPTIVE", repeats=True, overflow_budget=0.1, outlier_headroom=1.0),
    "hf_amp PERFORMANCE_OPTIMIZED": ours("PERFORMANCE_OPTIMIZED"),
    "DeepSpeed's rule": rule(HysteresisRule, 2.0**16),
    "Megatron's rule": rule(HysteresisRule, 2.0**32),
    "LogMax": rule(LogMaxRule, 2.0**16),
    "Graphcore ALS": rule(HistogramRule, 2.0**16),
    "oracle that fits an outlier into every step": lambda model: Precision(
        Oracle(list(model.parameters()), OUTLIER_FACTOR, 2.0**16)
    ),
}
