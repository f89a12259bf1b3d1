"""A Trainer's run goes on from a checkpoint: made with hf_amp or without it, in this precision or another."""

from __future__ import annotations

import functools

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
