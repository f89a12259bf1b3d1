"""What a run goes on from in any precision."""

from __future__ import annotations

from typing import Any

from hf_amp.plain import read
from hf_amp.session import AmpSession


def progress_of(session: AmpSession) -> dict[str, Any]:
    """What a run in any precision goes on from: counters and figures, and the precision that they were made in."""
    return {"precision": session.asked_for.value, **session.scaler.progress()}


def go_on_from(progress: dict[str, Any], session: AmpSession) -> str:
    """Restores what `progress_of` has saved, but no plan that was made for another precision.

    Returns:
        The precision that the saved run was in.

    Raises:
        StateError: something in it cannot be; nothing has changed then.
    """
    progress = read(dict[str, Any], progress, "the progress")
    precision = str(progress.get("precision", session.asked_for.value))
    companions = read(dict[str, Any], progress.get("companions", {}), "the companions")
    if precision != session.asked_for.value:
        companions.pop("fallback", None)
    session.scaler.load_progress({**progress, "companions": companions})
    return precision
