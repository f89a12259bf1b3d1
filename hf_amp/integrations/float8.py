"""FP8, which accelerate has torchao or TransformerEngine run: hf_amp observes and checks, modules do not fall back."""

from __future__ import annotations

import dataclasses

from accelerate import Accelerator
from accelerate.utils.dataclasses import FP8BackendType

from hf_amp.config import MixedPrecisionConfig
from hf_amp.device import Hardware
from hf_amp.errors import AttachError

_RUNNERS = {FP8BackendType.AO: "torchao", FP8BackendType.TE: "TransformerEngine"}


def runner_on(accelerator: Accelerator) -> str | None:
    """The library that runs FP8 on `accelerator`; None where nothing runs in FP8.

    Raises:
        AttachError: it is one that hf_amp does not know.
    """
    if accelerator.mixed_precision != "fp8":
        return None
    if accelerator.fp8_backend not in _RUNNERS:
        raise AttachError(
            f"hf_amp does not support FP8 by {accelerator.fp8_backend.value}, which scales by itself: use AORecipeKwargs "
            "(torchao) or TERecipeKwargs (TransformerEngine) in kwargs_handlers, or leave attach out."
        )
    return _RUNNERS[accelerator.fp8_backend]


def finite_check_only(config: MixedPrecisionConfig, runner: str) -> MixedPrecisionConfig:
    """`config` for a run in which `runner` owns the precision of the modules.

    Raises:
        ConfigError: an option would change what modules or parameters run in.
    """
    options = ("precision_mode", "half_parameters", "communication_precision")
    config.refuse(options, f"FP8 is run by {runner}, and hf_amp only observes and checks it")
    return dataclasses.replace(config, automatic_fallback=False)


def limits(runner: str) -> str:
    """What hf_amp leaves alone, to go on with after what runs."""
    return f"; FP8 is run by {runner}: hf_amp observes and checks, modules do not fall back"


def describe(runner: str, hardware: Hardware) -> str:
    """One phrase for what runs. accelerate runs everything that is not FP8 under BF16 autocast."""
    return f"FP8 by {runner} with BF16 around it on {hardware.name}"
