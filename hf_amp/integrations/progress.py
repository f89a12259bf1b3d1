"""What a run goes on from in any precision."""

from __future__ import annotations

from typing import Any

from hf_amp.session import AmpSession


def progress_of(session: AmpSession) -> dict[str, Any]:
    """What a run in any precision goes on from: counters and figures, and the precision that they were made in."""
    return {"precision": session.asked_for.value, **session.scaler.progress()}


def go_on_from(progress: dict[str, Any], session: AmpSession) -> str:
    """Restores what `progress_of` has saved, but no plan that was made for another precision.

    Returns:
        The precision that the saved run was in.
    """
    precision = str(progress.get("precision", session.asked_for.value))
    if precision != session.asked_for.value:
        companions = {k: v for k, v in progress.get("companions", {}).items() if k != "fallback"}
        progress = {**progress, "companions": companions}
    session.scaler.load_progress(progress)
    return precision
