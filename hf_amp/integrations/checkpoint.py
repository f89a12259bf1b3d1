"""`save_state` and `load_state` of an accelerator: whole or not at all, with our state in it, across precisions."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import SCALER_NAME

from hf_amp import saved
from hf_amp.errors import StateError
from hf_amp.events import EventKind
from hf_amp.integrations.optimizers import DecidedOptimizers
from hf_amp.integrations.progress import go_on_from, progress_of
from hf_amp.integrations.staging import Staging, finish_interrupted
from hf_amp.plain import read
from hf_amp.precision import PrecisionMode
from hf_amp.session import AmpSession

GUARD_NAME = "hf_amp.pt"
"""Where BF16 and FP32 runs keep what FP16 runs keep in `scaler.pt`, which a stock FP16 run would take its scale from."""

_NO_ROOM = ("inline_container", "iostream error")
"""How `torch.save` says that it cannot write: "enforce fail at inline_container.cc:672, unexpected pos 64 vs 0"."""


def keep_state_in_checkpoints(
    accelerator: Accelerator, session: AmpSession, optimizers: DecidedOptimizers
) -> None:
    """Makes `save_state` and `load_state` of `accelerator` keep the session's state too.

    A checkpoint appears whole or not at all: a process killed in `save_state` leaves the previous one to be loaded,
    also where the new one was to take its place. One made without hf_amp, or in another precision, loads.
    """
    _save_whole(accelerator, session, optimizers)
    _load_from_any_precision(accelerator, session, optimizers)


def _save_whole(accelerator: Accelerator, session: AmpSession, optimizers: DecidedOptimizers) -> None:
    save_state = accelerator.save_state

    @functools.wraps(save_state)
    def save_whole(output_dir: str | None = None, *args: Any, **kwargs: Any) -> Any:
        def write(folder: Path) -> None:
            with optimizers.without_scaler():
                save_state(str(folder), *args, **kwargs)

        project = accelerator.project_configuration
        if not project.automatic_checkpoint_naming:
            if output_dir is None:
                return save_state(output_dir, *args, **kwargs)  # whose error says what is missing
            return _save(accelerator, session, write, Staging(Path(output_dir)))
        place = Path(accelerator.project_dir) / "checkpoints" / f"checkpoint_{accelerator.save_iteration}"
        staging = Staging(place, beside=place.parents[1])
        if staging.replaces:
            return save_state(output_dir, *args, **kwargs)  # which refuses to
        # Named as upstream does, but the oldest goes only when the newest is there.
        project.automatic_checkpoint_naming = False
        try:
            _save(accelerator, session, write, staging)
        finally:
            project.automatic_checkpoint_naming = True
        if accelerator.is_main_process and project.total_limit is not None:
            _delete_oldest(place, keep=project.total_limit)
        return place

    session.changes.set_attribute(accelerator, "save_state", save_whole)


def _save(
    accelerator: Accelerator, session: AmpSession, write: Callable[[Path], None], staging: Staging
) -> Path:
    """Every rank takes part: a checkpoint is in its place when all have written their part of it."""
    guards = session.scaler.guards_only
    accelerator.wait_for_everyone()  # until all have seen whether it replaces another
    if accelerator.is_local_main_process:
        staging.clear()
    accelerator.wait_for_everyone()
    try:
        write(staging.folder)
        if guards and accelerator.is_local_main_process:
            torch.save(progress_of(session), staging.folder / GUARD_NAME)
    except BaseException as error:
        free = shutil.disk_usage(staging.folder).free if staging.folder.is_dir() else None
        if accelerator.is_local_main_process:
            shutil.rmtree(staging.folder, ignore_errors=True)  # it would keep a full disk full
        if any(words in str(error) for words in _NO_ROOM):
            raise StateError(
                f"{staging.target}: the checkpoint cannot be written; is the disk full ({free} bytes were free)? What was "
                "there before is as it was."
            ) from error
        raise
    accelerator.wait_for_everyone()
    # The main process first: where nodes share the folder, the others find nothing left to do.
    for publishes in (accelerator.is_main_process, accelerator.is_local_main_process):
        if publishes:
            staging.publish(stale=SCALER_NAME if guards else GUARD_NAME)
        accelerator.wait_for_everyone()
    return staging.target


def _delete_oldest(newest: Path, keep: int) -> None:
    """Leaves `keep` checkpoints, `newest` among them: a resumed run may have begun to count anew."""
    numbered = {
        int(path.name.rpartition("_")[2]): path
        for path in newest.parent.glob("checkpoint_[0-9]*")
        if path != newest
    }
    for number in sorted(numbered)[: max(len(numbered) + 1 - keep, 0)]:
        shutil.rmtree(numbered[number])


def _load_from_any_precision(
    accelerator: Accelerator, session: AmpSession, optimizers: DecidedOptimizers
) -> None:
    load_state = accelerator.load_state

    @functools.wraps(load_state)
    def load_any(input_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        if input_dir is not None:
            if accelerator.is_local_main_process:
                finish_interrupted(Path(input_dir).expanduser())
            accelerator.wait_for_everyone()
        told: list[str] = []
        # Ours comes first, so that a damaged one leaves the models as they are.
        watch = accelerator.register_load_state_pre_hook(
            lambda models, folder: told.append(_load_session(session, Path(folder)))
        )
        scaler = accelerator.scaler
        accelerator.scaler = None  # upstream insists on a scaler.pt where there is one; we load what there is
        try:
            with optimizers.without_scaler(), session.scaler.all_or_nothing():
                load_state(input_dir, *args, **kwargs)
        finally:
            accelerator.scaler = scaler
            watch.remove()
        session.begin_at(session.scaler.decided_steps)
        session.note(
            EventKind.STATE_LOADED,
            told[0],
            scale=session.scaler.get_scale(),
            applied_steps=session.scaler.applied_steps,
            skipped_steps=session.scaler.skipped_steps,
        )

    session.changes.set_attribute(accelerator, "load_state", load_any)


def _load_session(session: AmpSession, folder: Path) -> str:
    """Takes up scale, policy, counters and plan, as far as the checkpoint in `folder` holds them; says what it did.

    Raises:
        StateError: what is there is damaged or something else; then nothing has changed.
    """
    own, others = (GUARD_NAME, SCALER_NAME) if session.scaler.guards_only else (SCALER_NAME, GUARD_NAME)
    name = next((name for name in (own, others) if (folder / name).is_file()), None)
    if name is None:
        message = (
            f"{folder} holds no state of a scaler (saved in BF16 or FP32, or on a CPU, without hf_amp): scale and "
            "counters stay as they are"
        )
    else:
        state = read(dict[str, Any], saved.read(folder / name), str(folder / name))
        message = f"goes on from the {name} of {folder}"
        if name == SCALER_NAME == own:
            session.scaler.load_state_dict(state)
        elif name == GUARD_NAME:
            go_on_from(state, session)
        else:
            own_part = read(dict[str, Any], state.get("hf_amp", {}), f"{folder / name}['hf_amp']")
            go_on_from({"precision": PrecisionMode.MIXED.value, **own_part}, session)
        if name == others:
            message += (
                ", which another precision has saved: counters are taken over, a scale and a plan are not"
            )
    return f"{message}."
