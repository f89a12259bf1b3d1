"""Options that are right one by one and wrong together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_amp.errors import ConfigError
from hf_amp.precision import FP32_FORMAT, LARGEST_SCALE, SMALLEST_SCALE, PrecisionMode, ScalingStrategy

if TYPE_CHECKING:
    from hf_amp.config import MixedPrecisionConfig


def check_together(config: MixedPrecisionConfig) -> None:
    """Looks at options whose values, each allowed, contradict each other.

    Raises:
        ConfigError: two of them do; both are named, with what to do.
    """
    _check_formats(config)
    _check_scale(config)
    if config.on_overflow == "retry" and config.scaling_strategy is ScalingStrategy.PERFORMANCE_OPTIMIZED:
        raise ConfigError(
            "MixedPrecisionConfig(on_overflow='retry', scaling_strategy=PERFORMANCE_OPTIMIZED): its verdicts come one "
            "step late, when the batch is gone; use ADAPTIVE, or leave on_overflow out for the default (skip)."
        )


def _check_formats(config: MixedPrecisionConfig) -> None:
    if config.precision_mode is PrecisionMode.FP16 and config.half_parameters in ("error", "upcast"):
        raise ConfigError(
            f"MixedPrecisionConfig(precision_mode=FP16, half_parameters={config.half_parameters!r}): FP16 trains "
            "half-precision parameters with FP32 master weights; leave half_parameters out, or train FP32 parameters "
            "under FP16 autocast with precision_mode=MIXED."
        )
    if config.precision_mode is PrecisionMode.DYNAMIC and config.half_parameters == "master_weights":
        raise ConfigError(
            "MixedPrecisionConfig(precision_mode=DYNAMIC, half_parameters='master_weights'): DYNAMIC moves between "
            "precisions, which needs FP32 parameters; leave half_parameters out, or choose another precision_mode."
        )
    if config.communication_precision is not None and not config.distributed_amp:
        raise ConfigError(
            f"MixedPrecisionConfig(communication_precision={config.communication_precision.value}): nothing is sent "
            "unless several processes train together; set distributed_amp=True too, or leave it out."
        )


def _check_scale(config: MixedPrecisionConfig) -> None:
    if config.min_scale < FP32_FORMAT.smallest_normal:
        raise ConfigError(
            f"MixedPrecisionConfig(min_scale={config.min_scale!r}): the floor must be at least "
            f"{FP32_FORMAT.smallest_normal!r} (2^-126), below which gradients cannot be divided by the scale in FP32; "
            f"leave min_scale out for the default ({SMALLEST_SCALE!r})."
        )
    if not config.min_scale <= config.max_scale <= LARGEST_SCALE:
        raise ConfigError(
            f"MixedPrecisionConfig(min_scale={config.min_scale!r}, max_scale={config.max_scale!r}): the floor must "
            f"not be above the ceiling, nor the ceiling above {LARGEST_SCALE!r} (2^127, so that the scale and "
            "its reciprocal stay finite in FP32); lower min_scale or set max_scale in between."
        )
    if not config.min_scale <= config.init_scale <= config.max_scale:
        raise ConfigError(
            f"MixedPrecisionConfig(init_scale={config.init_scale!r}): init_scale must lie in [min_scale, "
            f"max_scale] = [{config.min_scale!r}, {config.max_scale!r}]; move it or widen the bounds."
        )
