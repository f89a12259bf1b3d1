"""Every test here tells what it did to a run and what became of it; `python -m tests.faults` makes a table of that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Tally = Callable[[str, int, int], None]


@pytest.fixture
def tally(record_property: Callable[[str, Any], None]) -> Tally:
    """Notes (fault, how often injected, how often survived) for the table, and fails where one was lost."""

    def note(fault: str, injected: int, survived: int) -> None:
        lost = injected - survived
        row = {"fault": fault, "injected": injected, "survived": survived, "lost": lost}
        record_property("fault", row)
        assert injected > 0
        assert lost == 0, f"{fault}: {lost} of {injected} were not survived"

    return note
