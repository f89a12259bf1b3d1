"""The precisions and scaling strategies by name, and the facts of the number formats."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import torch
from torch import Tensor


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


FP16_FORMAT = NumberFormat("FP16", torch.float16)
BF16_FORMAT = NumberFormat("BF16", torch.bfloat16)
FP32_FORMAT = NumberFormat("FP32", torch.float32)
EMULATED_FORMATS = (
    FP16_FORMAT,
    BF16_FORMAT,
    NumberFormat("FP8 E4M3", torch.float8_e4m3fn),
    NumberFormat("FP8 E5M2", torch.float8_e5m2),
)
"""What a CPU can be made to compute in, also without units for it."""


class PrecisionMode(str, enum.Enum):
    """What the forward and backward passes of a run, or of one module, compute in.

    Attributes:
        number_format: what matrix products run in; FP32 where the mode changes nothing.
    """

    number_format: NumberFormat

    def __new__(cls, name: str, number_format: NumberFormat) -> PrecisionMode:
        mode = str.__new__(cls, name)
        mode._value_ = name
        mode.number_format = number_format
        return mode

    FP32 = "FP32", FP32_FORMAT
    """Single precision throughout; no autocast, no loss scaling."""
    FP16 = "FP16", FP16_FORMAT
    """Half-precision parameters with FP32 master weights (memory before everything)."""
    MIXED = "MIXED", FP16_FORMAT
    """FP16 autocast over FP32 parameters, with loss scaling: `fp16=True` of Trainer and Accelerator."""
    BF16 = "BF16", BF16_FORMAT
    """BF16 autocast over FP32 parameters: `bf16=True` of Trainer and Accelerator."""
    DYNAMIC = "DYNAMIC", FP32_FORMAT
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


HALF_DTYPES = (FP16_FORMAT.dtype, BF16_FORMAT.dtype)

SMALLEST_SCALE = FP16_FORMAT.smallest_subnormal
LARGEST_SCALE = 2.0 ** math.floor(math.log2(FP32_FORMAT.largest))


def upcast(x: Tensor) -> Tensor:
    """`x` in FP32 where it is FP16 or BF16, else `x` itself; differentiable."""
    return x.float() if x.dtype in HALF_DTYPES else x
