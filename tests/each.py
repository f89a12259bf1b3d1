"""A table of values in one test, where each value takes milliseconds; scenarios are cases of their own (`parametrize`)."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest

Test = Callable[..., None]


def forget_accelerators() -> None:
    """Accelerators share their state within a process: the next one starts without."""
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def for_each(names: str | Sequence[str], rows: Iterable[Any]) -> Callable[[Test], Test]:
    """Runs the test with every row in turn; an error says which. Takes what `parametrize` does, and several multiply.

    Fixtures are shared by the rows, Accelerators are not.
    """
    arguments = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    table = [dict(zip(arguments, row if len(arguments) > 1 else [row], strict=True)) for row in rows]
    assert table

    def decorate(test: Test) -> Test:
        @functools.wraps(test)
        def every(**given: Any) -> None:
            for values in table:
                forget_accelerators()
                try:
                    test(**given, **values)
                except (Exception, pytest.fail.Exception) as error:
                    raise AssertionError(f"with {values}") from error

        signature = inspect.signature(test)
        left = [p for name, p in signature.parameters.items() if name not in arguments]
        every.__signature__ = signature.replace(parameters=left)  # what pytest looks for fixtures in
        return every

    return decorate
