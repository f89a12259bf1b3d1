"""A disk that is full, and a folder that cannot be written to."""

from __future__ import annotations

import errno
import logging
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from hf_amp import EventKind, MixedPrecisionCallback, StateError
from hf_amp.events import LOG_FILE
from hf_amp.monitoring.sinks.jsonl import JsonLinesSink
from hf_amp.report.reader import read_run
from tests.faults.conftest import Tally
from tests.integrations.checkpointed_run import Run, begin
from tests.integrations.trainers import OverflowAt, parameters_of, regression_trainer
from tests.reference import assert_bitwise_equal

pytestmark = pytest.mark.usefixtures("fresh_accelerator_state")


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process can grow beyond `size` bytes: writing fails with EFBIG, as it does with ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # Python ignores SIGXFSZ
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def unprivileged() -> Iterator[None]:
    """Permissions hold for us too: root is nobody here, and its capabilities are not in effect."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """An empty folder that nobody may write to, and that everybody can reach."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    folder.chmod(0o555)
    top = Path(tempfile.gettempdir())
    for above in (p for p in (tmp_path, *tmp_path.parents) if top in p.parents):
        above.chmod(above.stat().st_mode | 0o055)
    yield folder
    folder.chmod(0o755)


def events_written(folder: Path) -> int:
    return read_run(folder).lines


def test_a_log_on_a_full_disk_costs_no_step(tmp_path: Path, caplog: pytest.LogCaptureFixture, tally: Tally) -> None:
    """ENOSPC at every line, from the real device for it: one warning that says why, and the run is the same to the bit."""
    (tmp_path / LOG_FILE).symlink_to("/dev/full")
    logged = begin()
    logged.session.log_to(tmp_path)
    with caplog.at_level(logging.WARNING, "hf_amp"):
        logged.train(0, 12)
        logged.session.log_metrics()
        logged.session.detach()
    tensors = logged.everything()[0]
    plain = begin()
    plain.train(0, 12)
    assert_bitwise_equal(tensors, plain.everything()[0])
    reported = [r.getMessage() for r in caplog.records if "events are lost" in r.getMessage()]
    assert len(reported) == 1
    assert os.strerror(errno.ENOSPC) in reported[0]
    tally("disk full (ENOSPC) at every line of the event log", 12, logged.session.scaler.decided_steps)


def test_a_trainer_goes_on_where_its_log_cannot(tmp_path: Path, tally: Tally) -> None:
    """The same through the callback: training ends as it would have, and the incident is in the session."""
    trained = {}
    for folder in ("full", "roomy"):
        (tmp_path / folder).mkdir()
        if folder == "full":
            (tmp_path / folder / LOG_FILE).symlink_to("/dev/full")
        callback = MixedPrecisionCallback()
        trainer = regression_trainer(tmp_path / folder, callback, OverflowAt(2), fp16=True)
        trainer.train()
        trained[folder] = parameters_of(trainer)
        assert [e.step for e in callback.session.events if e.kind is EventKind.STEP_SKIPPED] == [2]
    assert_bitwise_equal(trained["full"], trained["roomy"])
    tally("disk full (ENOSPC) at every line of a Trainer's event log", 1, 1)


def test_a_log_goes_on_when_there_is_room_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever room there is for the first line that does not fit: what was written before and after is read, and the
    torn line is passed over."""
    run = begin()
    sink = JsonLinesSink(tmp_path / LOG_FILE, "run", rank=0)
    event = run.session.events[0]
    sink.write(event)
    whole = (tmp_path / LOG_FILE).stat().st_size
    for room in range(0, whole - 1, 40):
        size = (tmp_path / LOG_FILE).stat().st_size
        before = events_written(tmp_path)
        caplog.clear()
        with largest_file(size + room), caplog.at_level(logging.WARNING, "hf_amp"):
            sink.write(event)
            sink.write(event)
        sink.write(event)
        assert events_written(tmp_path) == before + 1
        messages = [r.getMessage() for r in caplog.records]
        assert ["events are lost" in messages[0], "2 events are not in it" in messages[-1]] == [True, True]
        assert len(messages) == 2
    sink.close()


def saved_run(folder: Path) -> Run:
    run = begin()
    run.train(0, 3)
    run.accelerator.save_state(str(folder))
    run.train(3, 6)
    return run


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("target", ["saved", "new"])
def test_a_save_that_finds_no_room_leaves_the_checkpoint_before(tmp_path: Path, target: str, tally: Tally) -> None:
    """Whichever file does not fit, in the place of the former checkpoint or beside it: an error, every byte of the
    former one, nothing half-written left to keep the disk full, and a run that goes on."""
    run = saved_run(tmp_path / "saved")
    before = content(tmp_path)
    largest = max(map(len, before.values()))
    limits, survived = range(0, largest, largest // 20), 0
    for limit in limits:
        with largest_file(limit), pytest.raises(Exception, match=r"File too large|is the disk full"):
            run.accelerator.save_state(str(tmp_path / target))
        survived += content(tmp_path) == before
    run.train(6, 7)
    run.accelerator.save_state(str(tmp_path / target))
    again = begin()
    again.accelerator.load_state(str(tmp_path / target))
    assert_bitwise_equal(again.everything()[0], run.everything()[0])
    tally(f"no room (EFBIG) while saving, into {target}", len(limits), survived)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "hf_amp", str(place)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_while_saving(small_disk: Path, tally: Tally) -> None:
    """ENOSPC on a real file system: the former checkpoint stays, and the next save finds its room."""
    run = saved_run(small_disk / "saved")
    before = content(small_disk / "saved")
    room = sum(map(len, before.values()))
    survived, tries = 0, range(0, 64 * 1024 - 2 * room, 4096)
    for left in tries:
        ballast = small_disk / "ballast"
        with ballast.open("wb", buffering=0) as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(small_disk).free - left)
        try:
            run.accelerator.save_state(str(small_disk / "next"))
        except (OSError, RuntimeError, StateError, SafetensorError):
            survived += content(small_disk / "saved") == before and not (small_disk / "next").exists()
        else:
            survived += len(content(small_disk / "next")) == len(before)
            break
        finally:
            ballast.unlink()
    tally("disk full (ENOSPC) while saving", tries.index(left) + 1, survived)


def test_a_trainer_in_a_read_only_folder_trains(
    read_only: Path, caplog: pytest.LogCaptureFixture, tally: Tally
) -> None:
    """Without checkpoints a Trainer needs no folder, and with the callback neither: a warning says that no log is written."""
    callback = MixedPrecisionCallback()
    trainer = regression_trainer(read_only, callback, OverflowAt(2), fp16=True, save_strategy="no")
    with unprivileged(), caplog.at_level(logging.WARNING, "hf_amp"):
        trainer.train()
    assert [r.getMessage() for r in caplog.records if os.strerror(errno.EACCES) in r.getMessage()]
    assert callback.session.metrics()["skipped_steps"] == 1
    assert list(read_only.iterdir()) == []
    tally("read-only run folder of a Trainer", 1, 1)


def test_a_log_that_was_asked_for_is_an_error_in_a_read_only_folder(read_only: Path, tally: Tally) -> None:
    """`log_to` and `save_state` say at once what is wrong, and the run goes on."""
    run = begin()
    run.train(0, 2)
    with unprivileged():
        with pytest.raises(PermissionError, match=LOG_FILE):
            run.session.log_to(read_only)
        with pytest.raises(PermissionError, match="read-only"):
            run.accelerator.save_state(str(read_only / "saved"))
    run.train(2, 4)
    assert all(p.isfinite().all() for p in run.model.parameters())
    assert torch.is_grad_enabled()
    tally("read-only folder for log_to and save_state", 2, 2)
