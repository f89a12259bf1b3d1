"""Checkpoints and logs that are cut off, flipped, foreign or hostile: refused by name with nothing changed, or harmless."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_amp import AdvancedMixedPrecisionManager, AmpEvent, Cause, EventKind, StateError
from hf_amp.events import LOG_FILE
from hf_amp.integrations.checkpoint import FINITE_CHECK_FILE
from hf_amp.monitoring.sinks.jsonl import JsonLinesSink
from hf_amp.report.reader import read_run
from tests.faults.conftest import Tally
from tests.integrations.checkpointed_run import begin

pytestmark = pytest.mark.usefixtures("fresh_accelerator_state")

FILES = {"fp16": "scaler.pt", "bf16": FINITE_CHECK_FILE}
GARBAGE: tuple[Any, ...] = ("", "x", None, [], {}, [[1]], True, -1, 2.5, float("nan"), float("inf"), 10**400)


class RunsCode:
    """What a hostile file is pickled from: loading it makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return Path.touch, (self.trace,)


class Victim:
    """A run that has been somewhere else than its checkpoint, and goes through one damaged file after the other."""

    def __init__(self, folder: Path, precision: str) -> None:
        self.folder, self.file = folder, folder / FILES[precision]
        self.run = begin(precision)
        self.run.train(0, 5)
        self.run.accelerator.save_state(str(folder))
        self.original = self.file.read_bytes()
        self.saved = self.everything()
        self.run.train(5, 6)
        self.elsewhere = self.everything()
        assert not same(self.elsewhere, self.saved)

    def everything(self) -> Any:
        tensors, state = self.run.everything()
        return [x.clone() for x in tensors], state[1:]  # the learning rate apart: its scheduler is upstream's

    def load(self) -> None:
        self.run.accelerator.load_state(str(self.folder))

    def survives(self, damaged: bytes) -> bool:
        """Whether the file, so damaged, is refused with nothing changed, or loads as it was saved."""
        self.file.write_bytes(damaged)
        try:
            self.load()
        except StateError as error:
            return self.file.name in str(error) and same(self.everything(), self.elsewhere)
        if not same(self.everything(), self.saved):
            return False
        self.elsewhere = self.saved
        return True


def same(left: Any, right: Any) -> bool:
    return all(map(torch.equal, left[0], right[0])) and bool(left[1] == right[1])


@pytest.fixture(params=FILES)
def victim(request: pytest.FixtureRequest, tmp_path: Path) -> Victim:
    return Victim(tmp_path / "saved", request.param)


def test_a_state_cut_off_anywhere(victim: Victim, full_size: bool, tally: Tally) -> None:
    """Every length that a file can be cut to (every 31st, in the suite)."""
    lengths = range(0, len(victim.original), 1 if full_size else 31)
    survived = sum(victim.survives(victim.original[:length]) for length in lengths)
    tally(f"{victim.file.name} cut off", len(lengths), survived)


def test_a_state_with_a_flipped_bit(victim: Victim, full_size: bool, tally: Tally) -> None:
    """`torch.load` takes a number with a flipped bit for another number; here its checksum gives it away."""
    chance, flips = random.Random(0), 2000 if full_size else 100
    survived = 0
    for _ in range(flips):
        flipped = bytearray(victim.original)
        flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
        survived += victim.survives(bytes(flipped))
    tally(f"{victim.file.name} with a random bit flipped", flips, survived)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_foreign_or_hostile_state(victim: Victim, tmp_path: Path, tally: Tally) -> None:
    """Text, other pickles, other people's states, and pickles that run code: refused by name, and the code is not run."""
    trace = tmp_path / "code has run"
    foreign: list[bytes] = [b"", b"\0" * 4096, b"hello\n", b"PK\3\4" + b"\0" * 100, random.Random(0).randbytes(4096)]
    foreign += [pickle.dumps(x) for x in (RunsCode(trace), {"scale": 1.0}, [1, 2], victim.run.session.events[0])]
    for content in (RunsCode(trace), {"scale": RunsCode(trace)}, [1.0], torch.zeros(3), "text", 7, None):
        torch.save(content, victim.file)
        foreign.append(victim.file.read_bytes())
    survived = sum(victim.survives(content) for content in foreign)
    assert not trace.exists()
    pickle.loads(pickle.dumps(RunsCode(trace)))
    assert trace.exists(), "the hostile pickle is harmless anyway"
    tally(f"{victim.file.name} replaced by something foreign or hostile", len(foreign), survived)


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything in nested mappings and lists, the inner nodes too."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    for key, value in items:
        yield (*path, key)
        yield from leaves(value, (*path, key))


def replaced(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of `tree` with `value` at `path`."""
    if not path:
        return value
    twin = list(tree) if isinstance(tree, tuple) else copy.copy(tree)
    twin[path[0]] = replaced(tree[path[0]], path[1:], value)
    return twin


def test_garbage_in_any_place_of_a_state(victim: Victim, full_size: bool, tally: Tally) -> None:
    """A file that is whole and holds something else where a value was: refused with nothing changed, or taken for a value
    and trained on, finite and without an error."""
    whole = torch.load(victim.file, weights_only=True)
    cases = [(path, value) for path in leaves(whole) for value in GARBAGE]
    cases = cases if full_size else random.Random(0).sample(cases, 120)
    survived = 0
    for path, value in cases:
        torch.save(replaced(whole, path, value), victim.file)
        before = victim.everything()
        try:
            victim.load()
        except StateError:
            survived += same(victim.everything(), before)
        else:
            victim.run.train(5, 7)
            victim.run.session.metrics()
            survived += all(x.isfinite().all() for x in victim.everything()[0])
            victim.file.write_bytes(victim.original)
            victim.load()
    tally(f"{victim.file.name} with garbage in place of a value", len(cases), survived)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl"])
def test_where_upstreams_part_is_cut_off_ours_is_as_before(tmp_path: Path, file: str, tally: Tally) -> None:
    """accelerate's own files are its to refuse; the session is then where it was."""
    victim = Victim(tmp_path / "saved", "fp16")
    damaged = victim.folder / file
    whole, survived = damaged.read_bytes(), 0
    lengths = range(0, len(whole) - 1, max(len(whole) // 10, 1))
    for length in lengths:
        damaged.write_bytes(whole[:length])
        try:
            victim.load()
        except Exception:
            survived += victim.everything()[1] == victim.elsewhere[1]
        else:  # accelerate goes on without random states that it cannot read
            survived += file.startswith("random") and same(victim.everything(), victim.saved)
            victim.elsewhere = victim.saved
    tally(f"{file} cut off: the session's state", len(lengths), survived)


def test_a_managers_file_is_refused_whole(tmp_path: Path, full_size: bool, tally: Tally) -> None:
    """Cut off, or with a flipped bit: `load` says StateError, and the manager's state is as before."""
    manager = AdvancedMixedPrecisionManager(loss_fn=torch.nn.functional.mse_loss)
    manager.save(tmp_path / "manager.pt")
    whole = (tmp_path / "manager.pt").read_bytes()
    before, chance, survived = manager.state_dict(), random.Random(0), 0
    cuts = [whole[:length] for length in range(0, len(whole), 1 if full_size else 31)]
    flips = []
    for _ in range(2000 if full_size else 100):
        flipped = bytearray(whole)
        flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
        flips.append(bytes(flipped))
    for damaged in cuts + flips:
        (tmp_path / "manager.pt").write_bytes(damaged)
        with suppress(StateError):
            manager.load(tmp_path / "manager.pt")
        survived += manager.state_dict() == before
    tally("a manager's file cut off, or with a flipped bit", len(cuts) + len(flips), survived)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A log of a run with a skip, a change of precision and metrics."""
    path = tmp_path / "run" / LOG_FILE
    run = begin()
    run.session.log_to(path.parent)
    run.train(0, 5)
    run.session.log_metrics(loss=1.0)
    run.session.detach()
    return path


def reads(path: Path) -> bool:
    """Whether the log is read, or refused by name; anything else than a StateError is raised."""
    try:
        read_run(path)
    except StateError as error:
        return path.name in str(error)
    return True


def test_a_log_cut_off_anywhere_is_read_as_far_as_it_goes(log: Path, full_size: bool, tally: Tally) -> None:
    """Whole lines are read, and what a resumed run appends is read after them."""
    whole, survived = log.read_bytes(), 0
    event = AmpEvent(9, EventKind.STEP_SKIPPED, Cause.SCALE, 2.0, 1.0)
    lengths = range(0, len(whole), 1 if full_size else 17)
    for length in lengths:
        log.write_bytes(whole[:length])
        lines = read_run(log).lines
        sink = JsonLinesSink(log, "resumed", rank=0)
        sink.write(event)
        sink.close()
        history = read_run(log)
        newline_only = length < len(whole) and whole[length : length + 1] == b"\n"
        survived += (
            lines == whole[:length].count(b"\n")
            and history.lines == lines + 1 + newline_only
            and history.skipped_by_cause["SCALE"] >= 1
        )
    tally("event log cut off, and appended to", len(lengths), survived)


def test_a_log_with_flipped_bits_or_of_someone_else(log: Path, full_size: bool, tally: Tally) -> None:
    """Read, or refused by name: no other error, whatever is in it."""
    whole, chance, survived = log.read_bytes(), random.Random(0), 0
    flips = 5000 if full_size else 500
    for _ in range(flips):
        flipped = bytearray(whole)
        for _ in range(chance.choice([1, 1, 1, 8])):
            flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
        log.write_bytes(flipped)
        survived += reads(log)
    tally("event log with random bits flipped", flips, survived)
    foreign = [b"", b"\0" * 99, b"[" * 100_000, b'{"timestamp": ' * 50_000, random.Random(0).randbytes(9999)]
    foreign += [whole.replace(b": 1,", b": " + x + b",") for x in (b"null", b"[]", b'"x"', b"1e999", b"9" * 5000)]
    for content in foreign:
        log.write_bytes(content)
        survived += reads(log)
    tally("event log replaced by something foreign or hostile", len(foreign), survived - flips)
