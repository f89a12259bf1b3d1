"""The messages of the package, all of them: `tests/messages.py` finds them in the code."""

from __future__ import annotations

import re

from tests.messages import messages

LONGEST = 520
"""Characters of a paragraph, with what is filled in counted by its name."""
PRIVATE = ("companion", "passenger", "hopeless", "poison", "gravity", "rung", "adopt", "journal", "keeper")


def test_the_table_has_every_kind() -> None:
    """Errors, log lines, events and the table of causes."""
    kinds = {message.kind for message in messages()}
    assert {
        "ConfigError",
        "AttachError",
        "ScalerError",
        "StateError",
        "note",
        "warning",
        "AmpEvent",
        "CauseFacts",
    } <= kinds
    assert sum(1 for _ in messages()) > 100


def test_none_is_longer_than_a_paragraph() -> None:
    """Nor has a word that people outside of this project do not use, or two blanks."""
    for message in messages():
        assert len(message.text) <= LONGEST, message
        assert not re.search(r"\S  +\S", message.text), message
        assert not any(word in message.text.lower() for word in PRIVATE), message


def test_an_error_says_what_to_do() -> None:
    """What was found is not enough: a second clause says what is allowed or what to do."""
    for message in messages():
        if message.kind in ("ConfigError", "AttachError"):
            assert re.search(r"[:;.,]", message.text), message
