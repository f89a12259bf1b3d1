"""`DynamicMixedPrecisionTrainer`: runs what is fastest among what is stable, and changes its mind."""

from __future__ import annotations

import dataclasses

from hf_amp.config import MixedPrecisionConfig
from hf_amp.errors import ConfigError
from hf_amp.precision import PrecisionMode
from hf_amp.training.standard import StandardMixedPrecisionTrainer


class DynamicMixedPrecisionTrainer(StandardMixedPrecisionTrainer):
    """The standard trainer under `PrecisionMode.DYNAMIC`: the session chooses among FP16, BF16 and FP32 while training,
    and every change is an event.

    Args:
        config: options; `precision_mode` DYNAMIC, MIXED (where it starts in any case) or None.
        loss_fn: as in the standard trainer.
        accelerator: as in the standard trainer.

    Raises:
        ConfigError: `precision_mode` leaves no choice.
    """

    def _adjusted(self, config: MixedPrecisionConfig) -> MixedPrecisionConfig:
        if config.precision_mode not in (None, PrecisionMode.MIXED, PrecisionMode.DYNAMIC):
            raise ConfigError(
                f"{type(self).__name__}(precision_mode={config.precision_mode.value}): this trainer chooses the precision; "
                "leave precision_mode out, or use StandardMixedPrecisionTrainer."
            )
        return dataclasses.replace(config, precision_mode=PrecisionMode.DYNAMIC)
