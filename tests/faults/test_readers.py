"""Other threads look at a run while it trains, as a dashboard does."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from hf_amp import AmpEvent, AmpSession
from tests.faults.conftest import Tally
from tests.integrations.checkpointed_run import Run, begin
from tests.reference import TIMINGS, assert_bitwise_equal

pytestmark = pytest.mark.usefixtures("fresh_accelerator_state")

Figures = tuple[tuple[str, float], ...]


def untimed(session: AmpSession) -> Figures:
    return tuple((name, value) for name, value in session.metrics().items() if name not in TIMINGS)


class Reader(threading.Thread):
    """Reads everything, again and again, until it is stopped; keeps the different metrics, and what went wrong."""

    def __init__(self, session: AmpSession) -> None:
        super().__init__()
        self.session, self.going = session, True
        self.seen: set[Figures] = set()
        self.events: tuple[AmpEvent, ...] = ()
        self.reads, self.error = 0, None

    def run(self) -> None:
        try:
            while self.going:
                self.seen.add(untimed(self.session))
                events, plan = tuple(self.session.events), self.session.plan
                assert events[: len(self.events)] == self.events, "an event that was there is gone or another"
                assert all(isinstance(event, AmpEvent) and event.message for event in events)
                assert plan.describe()
                self.events, self.reads = events, self.reads + 1
        except BaseException as error:
            self.error = error


@contextmanager
def switching_often() -> Iterator[None]:
    """Threads take turns 500 times as often as usual."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def trained(steps: int, readers: int) -> tuple[Run, list[Reader], set[Figures]]:
    """A run with overflows and changes of plan, its readers, and its metrics after every step."""
    run = begin(scaling_strategy="DYNAMIC", growth_interval=3, recovery_steps=5)
    run.period = 20
    threads = [Reader(run.session) for _ in range(readers)]
    after_steps = {untimed(run.session)}
    with switching_often():
        for thread in threads:
            thread.start()
        for step in range(steps):
            run.train(step, step + 1)
            after_steps.add(untimed(run.session))
        for thread in threads:
            thread.going = False
            thread.join()
    return run, threads, after_steps


def test_three_readers_see_whole_steps_and_change_nothing(full_size: bool, tally: Tally) -> None:
    """What they read of metrics is what the training thread itself sees after some step, never a mixture of two; events
    only grow; and the run is equal to the bit to one that nobody looks at."""
    steps = 2000 if full_size else 150
    run, readers, after_steps = trained(steps, readers=3)
    for reader in readers:
        if reader.error is not None:
            raise reader.error
    alone, _, _ = trained(steps, readers=0)
    mine, theirs = run.everything(), alone.everything()
    assert_bitwise_equal(mine[0], theirs[0])
    assert mine[1] == theirs[1]
    torn: list[Any] = [figures for reader in readers for figures in reader.seen - after_steps]
    assert not torn
    seen = min(len(reader.seen) for reader in readers)
    assert seen > steps / 10, "the readers saw too little to tell"
    reads = sum(reader.reads for reader in readers)
    tally(f"reads by 3 threads during {steps} steps", reads, reads - len(torn))
