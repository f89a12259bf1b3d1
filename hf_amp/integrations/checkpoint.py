"""`save_state` and `load_state` of an accelerator: whole or not at all, with our state in it, across precisions."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import SCALER_NAME

from hf_amp.errors import StateError
from hf_amp.events import EventKind, counted_names
from hf_amp.monitoring.rewind import GOOD_FILE
from hf_amp.precision import PrecisionMode
from hf_amp.serialization import load_file, parse
from hf_amp.session import AmpSession

_WRITING = ".incomplete"
_WRITTEN = ".complete"


class AtomicCheckpoint:
    """Where a checkpoint is written before it takes its place.

    A new one is written beside its place and renamed. One that replaces another is written inside it, marked as
    whole by a rename, and then moved file by file, which `finish_interrupted` completes after a kill; what else lies
    in that folder stays.

    Args:
        target: the folder that the checkpoint is to be.
        beside: the folder, on the same file system, to write a new one in; None for that of `target`.

    Attributes:
        folder: where to write.
    """

    def __init__(self, target: Path, beside: Path | None = None) -> None:
        self.target = target
        self.replaces = target.exists()
        self.folder = target / _WRITING if self.replaces else (beside or target.parent) / f".{target.name}{_WRITING}"

    def clear(self) -> None:
        """Removes what an interrupted save has left, after completing it where it was whole."""
        if self.replaces:
            finish_interrupted(self.target)
        shutil.rmtree(self.folder, ignore_errors=True)

    def publish(self, stale: str) -> None:
        """Puts what was written in its place; does nothing where another process has.

        Args:
            stale: the name of a file that a checkpoint in that place may hold and that this one supersedes.
        """
        if not self.folder.is_dir():
            return
        if not self.replaces:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.folder.rename(self.target)
            return
        (self.target / GOOD_FILE).unlink(missing_ok=True)
        self.folder.rename(self.target / _WRITTEN)
        finish_interrupted(self.target)
        (self.target / stale).unlink(missing_ok=True)


def finish_interrupted(target: Path) -> None:
    """Moves into `target` what a process had written whole when it was killed; nothing to do otherwise."""
    whole = target / _WRITTEN
    if not whole.is_dir():
        return
    for file in sorted(path for path in whole.rglob("*") if path.is_file()):
        place = target / file.relative_to(whole)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)
    shutil.rmtree(whole)


FINITE_CHECK_FILE = "hf_amp.pt"
"""Where BF16 and FP32 runs keep what FP16 runs keep in `scaler.pt`, which a stock FP16 run would take its scale from."""

_NO_ROOM = ("inline_container", "iostream error")
"""How `torch.save` says that it cannot write: "enforce fail at inline_container.cc:672, unexpected pos 64 vs 0"."""


def saving_whole(
    accelerator: Accelerator, session: AmpSession, without_scaler: Callable[[], AbstractContextManager[None]]
) -> Callable[..., Any]:
    """An `accelerator.save_state` that keeps the session's state too, and whose checkpoint appears whole or not at all.

    A process killed in it leaves the previous checkpoint to be loaded, also where the new one was to take its place.

    Args:
        without_scaler: context in which optimizers step without a scaler.
    """
    save_state = accelerator.save_state

    @functools.wraps(save_state)
    def save_whole(output_dir: str | None = None, *args: Any, **kwargs: Any) -> Any:
        def write(folder: Path) -> None:
            if bad := session.non_finite_parameters(on_any_rank=True, saved_buffers=True):
                which = f"inf or NaN is in {counted_names(bad, 'tensor')} of this checkpoint"
                session.note(EventKind.CHECKPOINT_NON_FINITE, f"{which}: do not resume from it.")
            scaler = accelerator.scaler
            session.scaler.flush()  # where ranks agree on what still waits
            if not accelerator.is_local_main_process:
                accelerator.scaler = None  # upstream has every rank write the same file, and each keeps its own times
            try:
                with without_scaler():
                    save_state(str(folder), *args, **kwargs)
            finally:
                accelerator.scaler = scaler

        project = accelerator.project_configuration
        if not project.automatic_checkpoint_naming:
            if output_dir is None:
                return save_state(output_dir, *args, **kwargs)  # whose error says what is missing
            return _save(accelerator, session, write, AtomicCheckpoint(Path(output_dir)))
        place = Path(accelerator.project_dir) / "checkpoints" / f"checkpoint_{accelerator.save_iteration}"
        staging = AtomicCheckpoint(place, beside=place.parents[1])
        if staging.replaces:
            return save_state(output_dir, *args, **kwargs)  # which refuses to
        # Named as upstream does, but the oldest goes only when the newest is there.
        project.automatic_checkpoint_naming = False
        try:
            _save(accelerator, session, write, staging)
        finally:
            project.automatic_checkpoint_naming = True
        if accelerator.is_main_process and project.total_limit is not None:
            _delete_oldest(place, project.total_limit, session.rewinder.kept())
        return place

    return save_whole


def _save(
    accelerator: Accelerator, session: AmpSession, write: Callable[[Path], None], staging: AtomicCheckpoint
) -> Path:
    """Every rank takes part: a checkpoint is in its place when all have written their part of it."""
    no_scaling = session.scaler.no_scaling
    accelerator.wait_for_everyone()  # until all have seen whether it replaces another
    if accelerator.is_local_main_process:
        staging.clear()
    accelerator.wait_for_everyone()
    try:
        write(staging.folder)
        if no_scaling and accelerator.is_local_main_process:
            torch.save(session.progress(), staging.folder / FINITE_CHECK_FILE)
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
            staging.publish(stale=SCALER_NAME if no_scaling else FINITE_CHECK_FILE)
        accelerator.wait_for_everyone()
    session.rewinder.written(staging.target, session.newest_step)
    return staging.target


def _delete_oldest(newest: Path, keep: int, needed: Collection[Path]) -> None:
    """Leaves `keep` checkpoints, `newest` and `needed` among them: a resumed run may have begun to count anew."""
    others = [path for path in newest.parent.glob("checkpoint_[0-9]*") if path != newest]
    numbered = {int(path.name.rpartition("_")[2]): path for path in others if path not in needed}
    for number in sorted(numbered)[: max(len(others) + 1 - keep, 0)]:
        shutil.rmtree(numbered[number])


def loading_from_any_precision(
    accelerator: Accelerator, session: AmpSession, without_scaler: Callable[[], AbstractContextManager[None]]
) -> Callable[..., None]:
    """An `accelerator.load_state` that takes up the session's state, also of a checkpoint made without hf_amp, or in another
    precision. Arguments as of `saving_whole`.
    """
    load_state = accelerator.load_state

    @functools.wraps(load_state)
    def load_any(input_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        if input_dir is not None:
            if accelerator.is_local_main_process:
                finish_interrupted(Path(input_dir).expanduser())
            accelerator.wait_for_everyone()
        reported: list[str] = []
        # Ours comes first, so that a damaged one leaves the models as they are.
        watch = accelerator.register_load_state_pre_hook(
            lambda models, folder: reported.append(_load_session(session, Path(folder)))
        )
        scaler = accelerator.scaler
        accelerator.scaler = None  # upstream insists on a scaler.pt where there is one; we load what there is
        try:
            with without_scaler(), session.scaler.rollback_on_error():
                load_state(input_dir, *args, **kwargs)
        finally:
            accelerator.scaler = scaler
            watch.remove()
        session.begin_at(session.scaler.decided_steps)
        counts = {name: getattr(session.scaler, name) for name in ("applied_steps", "skipped_steps")}
        session.note(EventKind.STATE_LOADED, reported[0], scale=session.scaler.get_scale(), **counts)

    return load_any


def _load_session(session: AmpSession, folder: Path) -> str:
    """Takes up scale, policy, counters and plan, as far as the checkpoint in `folder` holds them; says what it did.

    Raises:
        StateError: what is there is damaged or something else; then nothing has changed.
    """
    own, others = (FINITE_CHECK_FILE, SCALER_NAME) if session.scaler.no_scaling else (SCALER_NAME, FINITE_CHECK_FILE)
    name = next((name for name in (own, others) if (folder / name).is_file()), None)
    if name is None:
        message = (
            f"{folder} holds no state of a scaler (saved in BF16 or FP32, or on a CPU, without hf_amp): scale and "
            "counters stay as they are"
        )
    else:
        state = parse(dict[str, Any], load_file(folder / name), str(folder / name))
        message = f"goes on from the {name} of {folder}"
        if name == SCALER_NAME == own:
            session.scaler.load_state_dict(state)
        elif name == FINITE_CHECK_FILE:
            session.load_progress(state)
        else:
            own_part = parse(dict[str, Any], state.get("hf_amp", {}), f"{folder / name}['hf_amp']")
            session.load_progress({"precision": PrecisionMode.MIXED.value, **own_part})
        if name == others:
            message += ", which another precision has saved: counters are taken over, a scale and a plan are not"
    return f"{message}."
