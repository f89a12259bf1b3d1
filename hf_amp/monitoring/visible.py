"""Text from a run as it may be shown: nothing in it moves a cursor, ends a line or hides."""

from __future__ import annotations


def visible(text: str) -> str:
    """`text` with control characters and everything else that does not print shown as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
