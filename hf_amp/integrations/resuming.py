"""A run goes on from a checkpoint: made with hf_amp or without it, in this precision or another."""

from __future__ import annotations

import functools
from typing import Any

from transformers import Trainer

from hf_amp.session import AmpSession


def load_scaler_where_there_is_one(trainer: Trainer, session: AmpSession) -> None:
    """Lets a run without loss scaling leave a checkpoint's loss scale alone, which Trainer loads into nothing."""
    load_scaler = trainer._load_scaler  # private; tests/contract fails by name if it goes

    @functools.wraps(load_scaler)
    def load_or_leave(checkpoint: str | None) -> None:
        if trainer.accelerator.scaler is not None:
            load_scaler(checkpoint)

    session.changes.set_attribute(trainer, "_load_scaler", load_or_leave)


def progress_of(session: AmpSession) -> dict[str, Any]:
    """What a run in any precision goes on from: counters and figures, and the precision that they were made in."""
    return {"precision": session.asked_for.value, **session.scaler.progress()}


def go_on_from(progress: dict[str, Any], session: AmpSession) -> str:
    """Restores what `progress_of` has saved, but no plan that was made for another precision.

    Returns:
        The precision that the saved run was in.
    """
    precision = str(progress.get("precision", session.asked_for.value))
    companions = dict(progress.get("companions", {}))
    if precision != session.asked_for.value:
        companions.pop("fallback", None)
    session.scaler.load_progress({**progress, "companions": companions})
    return precision
