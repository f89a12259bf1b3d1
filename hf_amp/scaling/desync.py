"""Ranks that have gone different ways through their loops, where none of them can go on any more: who is where, within a minute.

One has left a batch out before its backward, or has had fewer batches. The others wait in collectives of DistributedDataParallel or
FSDP, which know nothing of loops, until the process group's timeout: half an hour by default.

A thread in each process looks every few seconds whether its rank has moved. Only one that has not, for `PATIENCE_SECONDS`, says in
the process group's store where it is. It is proof that all of them do so, twice, and that PyTorch's flight recorder has another
operation, or another size, on each for the newest collective that all have begun: collectives go by their number. A rank that is
merely slow has begun none that does not fit. Nothing is exchanged and no collective is watched while ranks move.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import sys
import threading
import time
import traceback
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import nn

from hf_amp.errors import ScalerError, in_one_line
from hf_amp.events import EventKind, join_names
from hf_amp.statistics import is_sharded

if TYPE_CHECKING:
    from hf_amp.scaling.scaler import AdvancedGradScaler

_log = logging.getLogger("hf_amp")
PATIENCE_SECONDS = 30.0
"""After which a rank that has not moved says so; it looks six times as often."""
LOOKS_TO_READ, LOOKS_TO_RAISE = 2, 4
"""After so many looks more a rank that cannot go on ends; rank 0 later: the end of the others makes its collective raise."""
MEETINGS = 100
"""Of ranks that all make forward passes without a backward in between, as GANs do: so many times they are asked whether they all do."""
COLLECTIVES = 512
"""The newest ones that a rank tells of."""
_NOT_OURS = ("<", *(f"{Path(str(each.__file__)).parents[up]}{os.sep}" for each, up in ((torch, 1), (os, 0))))
_PACKAGE = f"{Path(__file__).parents[1]}{os.sep}"
_REMEDY = (
    "Leave a batch out on all ranks or on none (decide by a loss that was gathered), and give every rank as many batches "
    "(drop_last=True, even_batches=True)."
)


class Where(NamedTuple):
    """Where a rank is; equal at two looks where it has not moved.

    Attributes:
        backwards: backward passes begun.
        left_out: forward passes that were followed by another without a backward in between.
        words: what it is in, and the user's line that called it.
        in_backward: whether it is in a backward pass.
        at: the innermost Python instruction, and how many collectives the rank has begun.
    """

    backwards: int
    left_out: int
    words: str
    in_backward: bool
    at: str


class DesyncMonitor:
    """That thread of one run, from its start to `stop`; it ends with the scaler, and before the interpreter. No GPU-CPU sync.

    Args:
        scaler: of the run.
        note: records an event of a kind, with a message.

    Raises:
        Exception: the process group has no store that a thread can share.
    """

    def __init__(self, scaler: AdvancedGradScaler, note: Callable[[EventKind, str], None]) -> None:
        self._scaler, self._note = weakref.ref(scaler), weakref.WeakMethod(note)
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._store = default_store()
        run = self._store.add(f"hf_amp runs of rank {self._rank}", 1)  # attached in the same order on all ranks
        self._prefix = f"hf_amp run {run} "
        self._patience = min(PATIENCE_SECONDS, self._store.timeout.total_seconds() / 4)  # the process group's, mostly
        self._thread_id = threading.main_thread().ident
        self._left_out = self._meetings = self._beat = self._told_at = 0
        self._seen: Where | None = None
        self._since = time.monotonic()
        self._published: dict[str, Any] | None = None
        self._former: list[dict[str, Any]] = []
        self._moving_rank = (self._rank + 1) % self._ranks
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hf_amp desync monitor", daemon=True)
        atexit.register(self._stop_and_wait)  # in the store at the interpreter's end it would abort the process
        self._thread.start()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def stop(self) -> None:
        """Ends the thread."""
        self._ended.set()

    def _stop_and_wait(self) -> None:
        self._ended.set()
        self._thread.join(1.0)

    def before_forward(self, module: nn.Module, follows_forward: bool, may_gather: bool) -> None:
        """Before a forward pass with gradients. `follows_forward`: the one before it had no backward. `may_gather`: it holds shards.

        Raises:
            ScalerError: others are in that backward, which gathers shards, and wait for this rank.
        """
        self._thread_id = threading.get_ident()
        if follows_forward:
            self._left_out += 1
            if may_gather and self._meetings < MEETINGS and self._gathers_from_all(module):
                self._meetings += 1
                try:
                    self._meet(f"{self._prefix}meeting {self._meetings}")
                except ScalerError:
                    raise
                except Exception as error:  # the store is gone, or belonged to a process group that was replaced
                    self._give_up(in_one_line(error))

    def _gathers_from_all(self, module: nn.Module) -> bool:
        """Whether its forward pass gathers parameters from all ranks now: not from a part of them (replicas, tensor parallel)."""
        meshes = (cast(Any, p).device_mesh for p in module.parameters() if is_sharded(p))
        return any(mesh.ndim == 1 and mesh.size() == self._ranks for mesh in meshes)

    def _give_up(self, why: str) -> None:
        """For all: who came no more, and ran ahead into its backward, would be taken for one that waits there."""
        self._meetings = MEETINGS
        with suppress(Exception):
            self._store.set(f"{self._prefix}no meetings", "")
        _log.warning("hf_amp: rank %d asks the others no more whether they leave a batch out too: %s.", self._rank, why)

    def _meet(self, key: str) -> None:
        """Waits until all ranks begin such a forward pass, before it gathers what others do not gather now."""
        began = looked = time.monotonic()
        self._store.add(key, 1)
        former: dict[int, int] = {}
        while self._store.add(key, 0) < self._ranks:
            if self._store.check([f"{self._prefix}no meetings"]):
                self._give_up("another does not either")
                return
            waited = time.monotonic() - began
            if waited > 3 * self._patience:  # they go another way, and there is no proof that they wait
                self._give_up(f"they have not come in {waited:.0f} s")
                return
            time.sleep(min(0.001 + waited / 10, 0.1))
            if time.monotonic() - looked < self._patience / 6:
                continue
            looked = time.monotonic()
            here, rows = self._where(), {rank: self._row(rank) for rank in range(self._ranks) if rank != self._rank}
            waiting = {
                r: row for r, row in rows.items() if row and row["in_backward"] and row["backwards"] > here.backwards
            }
            if any(row["beat"] > former.get(r, sys.maxsize) for r, row in waiting.items()):
                places = {**{r: row["words"] for r, row in waiting.items()}, self._rank: here.words}
                reason = f"rank {self._rank} has left a batch out before its backward: {_in_words(places)}. {_REMEDY}"
                self._tell([*waiting.values(), self._row(self._rank)], reason)
                time.sleep(LOOKS_TO_READ * self._patience / 6)  # the others say it before this one ends
                raise ScalerError(reason)
            former = {r: row["beat"] for r, row in waiting.items()}

    def _watch(self) -> None:
        with suppress(Exception):  # the store goes with the process that holds it
            while not self._ended.wait(self._patience / 6) and self._scaler() is not None:
                self._look()
        atexit.unregister(self._stop_and_wait)

    def _look(self) -> None:
        here = self._where()
        if here != self._seen:
            self._seen, self._since, self._former, self._told_at = here, time.monotonic(), [], 0
            if self._published is not None:
                self._store.set(self._key(self._rank), "null")
                self._published = None
            return
        if time.monotonic() - self._since < self._patience:
            return
        self._beat += 1
        if self._published is None:
            self._published = {**here._asdict(), "collectives": newest_collectives(), "standstill": uuid.uuid4().hex}
        self._store.set(self._key(self._rank), json.dumps({**self._published, "beat": self._beat}))
        if self._rank == 0:  # all have to stand still, so that one can look for all of them
            self._prove()
        if self._store.check([f"{self._prefix}reason"]):
            reason, standstills = json.loads(self._store.get(f"{self._prefix}reason"))
            if self._published["standstill"] in standstills:  # not where it has moved since, nor of a former start
                self._end(reason)

    def _tell(self, rows: Sequence[Mapping[str, Any] | None], reason: str) -> None:
        """Tells the ranks of `rows` why they cannot go on."""
        self._store.set(f"{self._prefix}reason", json.dumps([reason, [row["standstill"] for row in rows if row]]))

    def _prove(self) -> None:
        """Tells all where nobody can go on."""
        rows = self._everyone()
        former, self._former = self._former, rows
        if not (rows and former and (mismatch := mismatch_of([row["collectives"] for row in rows]))):
            return
        if any(
            new["beat"] <= old["beat"] or new["standstill"] != old["standstill"]
            for new, old in zip(rows, former, strict=True)
        ):
            return
        places = {rank: str(row["words"]) for rank, row in enumerate(rows)}
        left_out = [row["left_out"] for row in rows]
        ranks = [f"{n} by rank {r}" for r, n in enumerate(left_out) if n] if len(set(left_out)) > 1 else []
        how = f" Batches left out before their backward: {join_names(ranks)}." if ranks else ""
        self._tell(
            rows, f"ranks have gone different ways, and none can go on: {_in_words(places)}.{how} {mismatch} {_REMEDY}"
        )

    def _everyone(self) -> list[dict[str, Any]]:
        """What all ranks have said of themselves; nothing where one moves, which is looked at first the next time."""
        rows: dict[int, dict[str, Any]] = {}
        for rank in sorted(range(self._ranks), key=lambda rank: rank != self._moving_rank):
            if (row := self._row(rank)) is None:
                self._moving_rank = rank
                return []
            rows[rank] = row
        return [rows[rank] for rank in range(self._ranks)]

    def _end(self, reason: str) -> None:
        """Says why; a look or more later, where this rank is still there, it ends: nothing takes a thread out of a gloo collective."""
        if not self._told_at:
            self._told_at = self._beat
            _log.error("hf_amp: %s", reason)
            if not _is_on_console():
                sys.stderr.write(f"hf_amp: {reason}\n")
            if (note := self._note()) is not None:  # in a thread: the run may hold its lock while it waits
                writer = threading.Thread(target=note, args=(EventKind.RANKS_PARTED, reason), daemon=True)
                writer.start()
                writer.join(self._patience / 6)
        elif self._beat - self._told_at >= (LOOKS_TO_READ if self._rank else LOOKS_TO_RAISE):
            for stream in (sys.stdout, sys.stderr):
                with suppress(Exception):
                    stream.flush()
            logging.shutdown()
            os._exit(1)

    def _where(self) -> Where:
        scaler = self._scaler()
        backwards = 0 if scaler is None else scaler._pending.backwards
        words, in_backward, at = _place(cast(int, self._thread_id), backwards)
        return Where(backwards, self._left_out, words, in_backward, f"{at} {collectives_begun()}")

    def _row(self, rank: int) -> dict[str, Any] | None:
        """What a rank has said that has not moved; None of one that moves."""
        key = self._key(rank)
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def _key(self, rank: int) -> str:
        return f"{self._prefix}rank {rank}"


def _is_on_console() -> bool:
    """Whether an error that is logged comes to the console: a user may have turned the logger off, or have a file alone."""
    logger: logging.Logger | None = _log
    handlers: list[logging.Handler] = []
    while logger is not None:
        handlers += logger.handlers
        logger = logger.parent if logger.propagate else None
    shows = [
        isinstance(each, logging.StreamHandler) and not isinstance(each, logging.FileHandler) for each in handlers
    ] or [True]
    return _log.isEnabledFor(logging.ERROR) and any(shows)


def _place(thread_id: int, backwards: int) -> tuple[str, bool, str]:
    """Where a thread is, in words; whether that is in a backward pass; and its innermost instruction."""
    frame = sys._current_frames().get(thread_id)
    at = "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lasti}"
    phase, user = "", ""
    for each, line in traceback.walk_stack(frame) if frame is not None else ():
        file, name = each.f_code.co_filename, each.f_code.co_name
        if not file.startswith((*_NOT_OURS, _PACKAGE)):
            user = f"{os.path.basename(file)}, line {line}"
            break
        if name == "_engine_run_backward":
            phase = "backward"
        elif name == "_call_impl" and phase != "backward":
            phase = "forward"
        elif file.endswith("distributed_c10d.py") and not phase:
            phase = name
    after = f"after backward pass {backwards}" if backwards else "before the first backward pass"
    in_words = {"backward": f"in backward pass {backwards}", "forward": f"in the forward pass {after}", "": after}
    words = in_words.get(phase, f"in torch.distributed.{phase} {after}")
    return f"{words} ({user})" if user else words, phase == "backward", at


def _in_words(places: Mapping[int, str]) -> str:
    """Which ranks are where."""
    by_place: dict[str, list[str]] = {}
    for rank, words in sorted(places.items()):
        by_place.setdefault(words, []).append(str(rank))
    return "; ".join(
        f"rank {its[0]} is {words}" if len(its) == 1 else f"ranks {join_names(its)} are {words}"
        for words, its in by_place.items()
    )


def default_store() -> Any:
    """The default process group's store, over a connection of its own. Private upstream; tests/contract fails by name if it goes."""
    from torch.distributed.distributed_c10d import _get_default_store

    return cast(Any, _get_default_store()).clone()


def collectives_begun() -> int:
    """How many the default process group has begun. Private upstream; tests/contract fails by name if it goes."""
    return int(cast(Any, dist.group.WORLD)._get_sequence_number_for_group()) if dist.is_initialized() else 0


def newest_collectives() -> dict[str, dict[str, str]]:
    """Of the default process group, by backend: number of a collective → its operation, and what it takes where all take the same.

    From PyTorch's flight recorder, which is on by default (`TORCH_FR_BUFFER_SIZE`), and empty where it is not. Private upstream;
    tests/contract fails by name if it goes.
    """
    trace = json.loads(cast(Any, torch._C)._distributed_c10d._dump_fr_trace_json(True, False))
    found: dict[str, dict[str, str]] = {}
    for entry in trace.get("entries", [])[-COLLECTIVES:]:
        backend, _, name = entry["profiling_name"].partition(":")
        if entry["is_p2p"] or entry["process_group"][1] != "default_pg":
            continue
        varies = name in ("gather", "scatter") or "all_to_all" in name or "alltoall" in name
        sizes = [] if varies else [torch.Size(size).numel() for size in entry["input_sizes"]]
        takes = f" of {sum(sizes):,} {'/'.join(sorted(set(entry['input_dtypes'])))}" if sizes else ""
        known, number = found.setdefault(backend, {}), entry["collective_seq_id"]
        if known and number <= int(next(reversed(known))):  # a new process group, in place of one that was destroyed
            known.clear()
        known[str(number)] = f"{name}{takes}"
    return found


def mismatch_of(ranks: Sequence[Mapping[str, Mapping[str, str]]]) -> str:
    """That the newest collective which all ranks have begun is not the same on all of them, in words; "" where it is, or is not known."""
    for backend in ranks[0]:
        if not all(each.get(backend) for each in ranks):
            continue
        newest = str(min(max(map(int, each[backend])) for each in ranks))
        operations = {rank: each[backend].get(newest) for rank, each in enumerate(ranks)}
        if None not in operations.values() and len(set(operations.values())) > 1:
            shown = list(dict.fromkeys(operations.values()))[:2]
            first = [next(rank for rank, its in operations.items() if its == operation) for operation in shown]
            what = join_names([f"{op} on rank {rank}" for op, rank in zip(shown, first, strict=True)])
            return f"Collective {newest} of the process group is {what}."
    return ""
