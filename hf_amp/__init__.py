"""Mixed-precision training for HuggingFace Trainer and Accelerate that explains itself and keeps going.

Names load their modules when first used, as in transformers; `import hf_amp` alone loads neither that nor accelerate.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_amp.config import MixedPrecisionConfig
from hf_amp.errors import AttachError, BatchError, ConfigError, HfAmpError, ScalerError, StateError, UnknownOptionError
from hf_amp.events import AmpEvent, Cause, EventKind
from hf_amp.precision import NumberFormat, PrecisionMode, ScalingStrategy

if TYPE_CHECKING:
    from hf_amp.choose import choose_precision
    from hf_amp.comparison import compare
    from hf_amp.emulation import emulate
    from hf_amp.fallback.inference import check_inference
    from hf_amp.integrations.accelerate import attach
    from hf_amp.integrations.transformers import MixedPrecisionCallback
    from hf_amp.monitoring.monitor import PrecisionMonitor
    from hf_amp.monitoring.throughput import PerformanceTracker
    from hf_amp.rescale import rescale_for_fp16
    from hf_amp.scaling.scaler import AdvancedGradScaler
    from hf_amp.session import AmpSession
    from hf_amp.training.manager import AdvancedMixedPrecisionManager
    from hf_amp.training.trainers import (
        DynamicMixedPrecisionTrainer,
        PerformanceOptimizedMixedPrecisionTrainer,
        StandardMixedPrecisionTrainer,
    )  # fmt: skip

__version__ = "0.2.0"

__all__ = [
    "AdvancedGradScaler", "AdvancedMixedPrecisionManager", "AmpEvent", "AmpSession", "AttachError", "BatchError",
    "Cause", "ConfigError", "DynamicMixedPrecisionTrainer", "EventKind", "HfAmpError", "MixedPrecisionCallback",
    "MixedPrecisionConfig", "NumberFormat", "PerformanceOptimizedMixedPrecisionTrainer", "PerformanceTracker",
    "PrecisionMode", "PrecisionMonitor", "ScalerError", "ScalingStrategy", "StandardMixedPrecisionTrainer",
    "StateError", "UnknownOptionError", "attach", "check_inference", "choose_precision", "compare", "emulate",
    "rescale_for_fp16",
]  # fmt: skip

_LAZY = {
    "AdvancedGradScaler": "scaling.scaler", "AdvancedMixedPrecisionManager": "training.manager",
    "AmpSession": "session", "DynamicMixedPrecisionTrainer": "training.trainers",
    "MixedPrecisionCallback": "integrations.transformers",
    "PerformanceOptimizedMixedPrecisionTrainer": "training.trainers", "PerformanceTracker": "monitoring.throughput",
    "PrecisionMonitor": "monitoring.monitor", "StandardMixedPrecisionTrainer": "training.trainers",
    "attach": "integrations.accelerate", "check_inference": "fallback.inference", "choose_precision": "choose",
    "compare": "comparison", "emulate": "emulation", "rescale_for_fp16": "rescale",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"hf_amp.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'hf_amp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
