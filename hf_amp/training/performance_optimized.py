"""`PerformanceOptimizedMixedPrecisionTrainer`: the fastest stable precision, and the cheapest scaling."""

from __future__ import annotations

import dataclasses

from hf_amp.config import MixedPrecisionConfig
from hf_amp.precision import ScalingStrategy
from hf_amp.training.dynamic import DynamicMixedPrecisionTrainer


class PerformanceOptimizedMixedPrecisionTrainer(DynamicMixedPrecisionTrainer):
    """Times every precision that is stable on this device in the first steps, and goes on in the fastest; scales by
    PERFORMANCE_OPTIMIZED, and clips within the optimizer's step.

    What was chosen, and the times that it was chosen by, are an event. Emulated FP16 cannot be the fastest: on a CPU its
    half kernels are timed, which leaves FP32 where it has no units for them.

    Args:
        config: options; `precision_mode` DYNAMIC, MIXED (where it starts in any case) or None; any `scaling_strategy`
            and `emulate`.
        loss_fn: as in the standard trainer.
        accelerator: as in the standard trainer.

    Raises:
        ConfigError: `precision_mode` leaves no choice.
    """

    _folds_clipping = True

    def _adjusted(self, config: MixedPrecisionConfig) -> MixedPrecisionConfig:
        return dataclasses.replace(
            super()._adjusted(config),
            scaling_strategy=ScalingStrategy.PERFORMANCE_OPTIMIZED,
            emulate=False,
        )
