"""Every error that hf_amp raises on purpose.

    HfAmpError
    ├── ConfigError (ValueError)          an option's value, or a combination of options, is wrong
    │   └── UnknownOptionError            no option has that name; names the nearest one
    ├── AttachError (RuntimeError)        hf_amp cannot work on this Trainer, Accelerator, model or device
    ├── BatchError (ValueError)           a batch, or the loss made from it, cannot be trained on
    ├── ScalerError (RuntimeError)        a scaler method was called in an order that has no meaning
    └── StateError (ValueError)           a checkpoint or event log does not hold what it should

A message says what was passed, what is allowed and what to do.
"""

from __future__ import annotations


class HfAmpError(Exception):
    """Base of all errors of hf_amp."""


class ConfigError(HfAmpError, ValueError):
    """An option's value, or a combination of options, is wrong."""


class UnknownOptionError(ConfigError):
    """No option has that name."""


class AttachError(HfAmpError, RuntimeError):
    """hf_amp cannot work on this Trainer, Accelerator, model or device."""


class BatchError(HfAmpError, ValueError):
    """A batch, or the loss made from it, cannot be trained on."""


class ScalerError(HfAmpError, RuntimeError):
    """A scaler method was called in an order that has no meaning."""


class StateError(HfAmpError, ValueError):
    """A checkpoint or event log does not hold what it should."""


def in_one_line(error: BaseException) -> str:
    """Type and text of any exception for a message, cut to 300 characters: torch's may hold a whole tensor."""
    return " ".join(f"{type(error).__name__}: {error}"[:300].split()).removesuffix(":")
