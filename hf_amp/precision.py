"""The precisions and scaling strategies by name, and the facts of the number formats."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import torch
from torch import Tensor


class PrecisionMode(str, enum.Enum):
    """What the forward and backward passes of a run, or of one module, compute in."""

    FP32 = "FP32"
    """Single precision throughout; no autocast, no loss scaling."""
    FP16 = "FP16"
    """Half-precision parameters with FP32 master weights (memory before everything)."""
    MIXED = "MIXED"
    """FP16 autocast over FP32 parameters, with loss scaling: `fp16=True` of Trainer and Accelerator."""
    BF16 = "BF16"
    """BF16 autocast over FP32 parameters: `bf16=True` of Trainer and Accelerator."""
    DYNAMIC = "DYNAMIC"
    """The fastest of the precisions that are stable on this device, chosen while training."""


class ScalingStrategy(str, enum.Enum):
    """How the loss scale is chosen: the registry of strategies, one line each.

    Attributes:
        policy: dotted path of its policy; the config gives it those options that are its fields.
        defers: whether a fused optimizer decides on the device, and the host learns of a skip one step later.
    """

    policy: str
    defers: bool

    def __new__(cls, name: str, policy: str, defers: bool = False) -> ScalingStrategy:
        strategy = str.__new__(cls, name)
        strategy._value_ = name
        strategy.policy, strategy.defers = policy, defers
        return strategy

    CONSTANT = "CONSTANT", "hf_amp.scaling.policies.ConstantScale"
    """`init_scale` throughout."""
    DYNAMIC = "DYNAMIC", "hf_amp.scaling.policies.DynamicScale"
    """Back off on overflow, grow after `growth_interval` clean steps; the rule of `torch.amp.GradScaler`."""
    ADAPTIVE = "ADAPTIVE", "hf_amp.scaling.adaptive.AdaptiveScale"
    """From the running distribution of the gradients."""
    PERFORMANCE_OPTIMIZED = "PERFORMANCE_OPTIMIZED", "hf_amp.scaling.adaptive.AdaptiveScale", True
    """ADAPTIVE's rule, without a GPU-CPU sync in the step where the optimizer is fused."""


@dataclass(frozen=True)
class NumberFormat:
    """Range of a floating-point format, read from `torch.finfo`, never written down as a literal."""

    name: str
    dtype: torch.dtype

    @property
    def largest(self) -> float:
        """Largest finite value."""
        return float(torch.finfo(self.dtype).max)

    @property
    def smallest_normal(self) -> float:
        """Smallest positive value held with full precision."""
        return float(torch.finfo(self.dtype).smallest_normal)

    @property
    def smallest_subnormal(self) -> float:
        """Smallest positive value. Source: IEEE 754-2019, 3.3: smallest normal times the spacing at one."""
        return self.smallest_normal * float(torch.finfo(self.dtype).eps)

    @classmethod
    def of(cls, mode: PrecisionMode) -> NumberFormat:
        """The format that matrix products run in under `mode`; FP32 where the mode changes nothing."""
        return {
            PrecisionMode.FP16: FP16_FORMAT,
            PrecisionMode.MIXED: FP16_FORMAT,
            PrecisionMode.BF16: BF16_FORMAT,
        }.get(mode, FP32_FORMAT)


FP16_FORMAT = NumberFormat("FP16", torch.float16)
BF16_FORMAT = NumberFormat("BF16", torch.bfloat16)
FP32_FORMAT = NumberFormat("FP32", torch.float32)
HALF_DTYPES = (FP16_FORMAT.dtype, BF16_FORMAT.dtype)

SMALLEST_SCALE = FP16_FORMAT.smallest_subnormal
LARGEST_SCALE = 2.0 ** math.floor(math.log2(FP32_FORMAT.largest))


def upcast(x: Tensor) -> Tensor:
    """`x` in FP32 where it is FP16 or BF16, else `x` itself; differentiable."""
    return x.float() if x.dtype in HALF_DTYPES else x
