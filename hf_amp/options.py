"""What values an option takes: in words for people, and as a check."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import field
from typing import Any

import torch

LARGEST_COUNT = torch.iinfo(torch.int32).max
"""Steps are counted in int32 on the device."""


class Allowed(str):
    """The values that an option takes: in words for people, which the text is, and as a check.

    A text, because `transformers.HfArgumentParser` hands a field's metadata to argparse, which knows `help` alone.
    """

    accepts: Callable[[Any], bool]

    def __new__(cls, words: str, accepts: Callable[[Any], bool]) -> Allowed:
        allowed = super().__new__(cls, words)
        allowed.accepts = accepts
        return allowed


def is_real(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and -sys.float_info.max <= value <= sys.float_info.max


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST_COUNT


SWITCH = Allowed("True or False", lambda v: isinstance(v, bool))
SWITCH_OR_NONE = Allowed("None, True or False", lambda v: v is None or isinstance(v, bool))
POSITIVE = Allowed("a positive finite number", lambda v: is_real(v) and v > 0)
POSITIVE_OR_NONE = Allowed("None or a positive finite number", lambda v: v is None or POSITIVE.accepts(v))
ABOVE_ONE = Allowed("a finite number above 1", lambda v: is_real(v) and v > 1)
FRACTION = Allowed("a number above 0 and below 1", lambda v: is_real(v) and 0 < v < 1)
SHARE = Allowed("a number from 0 up to, but not, 1", lambda v: is_real(v) and 0 <= v < 1)
ONE_OF_SKIP_RETRY = Allowed("'skip' or 'retry'", lambda v: v in ("skip", "retry"))
STEPS = Allowed(f"a whole number of steps from 1 to {LARGEST_COUNT}", is_count)
COUNT = Allowed(f"a whole number from 1 to {LARGEST_COUNT}", is_count)


def option_field(default: Any, allowed: Allowed) -> Any:
    return field(default=default, metadata={"help": allowed})
