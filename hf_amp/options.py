"""What values an option takes: in words for people, and as a check."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeGuard, TypeVar

import torch

from hf_amp.errors import UnknownOptionError

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


def shown(value: Any) -> str:
    """`repr(value)`, also of what has none, such as an int of more than 4300 digits."""
    try:
        return repr(value)
    except Exception:  # whatever a class of the user's raises
        return f"<{type(value).__name__} that cannot be shown>"


def is_real(value: Any) -> TypeGuard[float]:
    """Whether `value` is a finite number of Python's; a switch is none."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and -sys.float_info.max <= value <= sys.float_info.max


def is_count(value: Any) -> bool:
    """Whether `value` is a whole number from 1 on that int32 holds; a switch is none."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST_COUNT


SWITCH = Allowed("True or False", lambda v: isinstance(v, bool))
SWITCH_OR_NONE = Allowed("None, True or False", lambda v: v is None or isinstance(v, bool))
POSITIVE = Allowed("a positive finite number", lambda v: is_real(v) and v > 0)
POSITIVE_OR_NONE = Allowed("None or a positive finite number", lambda v: v is None or POSITIVE.accepts(v))
AT_LEAST_ONE = Allowed("a finite number of at least 1", lambda v: is_real(v) and v >= 1)
ABOVE_ONE = Allowed("a finite number above 1", lambda v: is_real(v) and v > 1)
FRACTION = Allowed("a number above 0 and below 1", lambda v: is_real(v) and 0 < v < 1)
SHARE = Allowed("a number from 0 up to, but not, 1", lambda v: is_real(v) and 0 <= v < 1)
ONE_OF_SKIP_RETRY = Allowed("'skip' or 'retry'", lambda v: isinstance(v, str) and v in ("skip", "retry"))
STEPS = Allowed(f"a whole number of steps from 1 to {LARGEST_COUNT}", is_count)
COUNT = Allowed(f"a whole number from 1 to {LARGEST_COUNT}", is_count)


def option_field(default: Any, allowed: Allowed) -> Any:
    """A dataclass field that `allowed` checks."""
    return dataclasses.field(default=default, metadata={"help": allowed})


def check_names(config: type[Any], names: Iterable[Any]) -> None:
    """Raises `UnknownOptionError`, which names the nearest option, where one of `names` is no field of `config`."""
    known = [option.name for option in dataclasses.fields(config)]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(shown(name).strip("'").lower(), known, n=1, cutoff=0.0)[0]
            raise UnknownOptionError(
                f"{config.__name__} has no option {shown(name)}; the nearest is {near!r}. Allowed: {', '.join(known)}."
            )


_Config = TypeVar("_Config")


def names_checked(config: type[_Config]) -> type[_Config]:
    """A dataclass that answers an unknown keyword as `check_names` does, not with Python's TypeError."""
    init = config.__init__

    @functools.wraps(init)
    def checked_init(self: _Config, *arguments: Any, **options: Any) -> None:
        check_names(config, options)
        init(self, *arguments, **options)

    config.__init__ = checked_init  # type: ignore[assignment, method-assign]
    return config


def hint(value: Any, default: Any) -> str:
    """What to do about text in the place of a number or a switch, as configuration files give it."""
    if not isinstance(value, str):
        return ""
    if isinstance(default, bool):
        return " It is text: write true or false without quotes."
    if isinstance(default, (int, float)) or value.replace(".", "", 1).isdigit():
        return " It is text: write numbers without quotes; YAML wants a point in 1.0e-6."
    return ""
