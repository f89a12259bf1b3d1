"""The console: a line for trouble, silence otherwise."""

import itertools
import logging

import pytest

from hf_amp import AmpEvent, Cause, EventKind
from hf_amp.monitoring.sinks.console import Console
from tests.each import for_each

TROUBLE = [kind for kind in EventKind if kind.needs_attention]
CALM = [kind for kind in EventKind if not kind.needs_attention]


@for_each("kind", TROUBLE)
def test_trouble_is_one_warning(caplog, kind):
    """It shows with Python's default logging, from the logger "hf_amp"."""
    caplog.clear()
    Console().write(AmpEvent(12, kind, message="read the cause"))
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("hf_amp", logging.WARNING)
    assert record.getMessage().startswith(f"step 12: {kind.value}")
    assert "read the cause" in record.getMessage()


@for_each("kind", CALM)
def test_nothing_shows_when_nothing_is_wrong(caplog, kind):
    """Starting and ending print no line, unless debug lines are asked for."""
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="hf_amp"):
        Console().write(AmpEvent(0, kind, message="hf_amp is attached"))
    assert caplog.records == []
    with caplog.at_level(logging.DEBUG, logger="hf_amp"):
        Console().write(AmpEvent(0, kind, message="hf_amp is attached"))
    assert [record.levelno for record in caplog.records] == [logging.DEBUG]


def test_a_skip_names_cause_and_change_of_the_scale(caplog):
    """Why, from what, to what."""
    Console().write(AmpEvent(3, EventKind.STEP_SKIPPED, Cause.SCALE, before=65536.0, after=32768.0, message="normal"))
    assert caplog.messages == ["step 3: step_skipped (SCALE): 65536 -> 32768: normal"]


@for_each(("before", "after"), [(None, None), (65536.0, None), ("MIXED", "BF16"), (1.0, 1.0)])
def test_a_change_that_is_no_pair_of_numbers_prints_no_arrow(caplog, before, after):
    """A line never shows half of a change, nor a scale that stays, as in BF16."""
    caplog.clear()
    Console().write(AmpEvent(3, EventKind.STEP_SKIPPED, before=before, after=after, message="text"))
    assert caplog.messages == ["step 3: step_skipped: text"]


@pytest.mark.parametrize(("modules", "where"), [(3, "h.0, h.1, h.2"), (96, "h.0, h.1, h.2 and 93 more")])
def test_a_line_names_a_few_of_many_modules(caplog, modules, where):
    """A large model that overflows everywhere still has a line that can be read; the event has all names."""
    names = tuple(f"h.{i}" for i in range(modules))
    Console().write(AmpEvent(3, EventKind.STEP_SKIPPED, modules=names, message="text"))
    assert caplog.messages == [f"step 3: step_skipped in {where}: text"]


def test_a_whole_model_is_named(caplog):
    """A model that is one module, or overflows in its own forward, has the name "" in events, and is called by what it is."""
    Console().write(AmpEvent(3, EventKind.STEP_SKIPPED, modules=("", "head"), message="text"))
    assert caplog.messages == ["step 3: step_skipped in the model, head: text"]


def test_percent_signs_are_text(caplog):
    """A message is never taken as a format."""
    Console().write(AmpEvent(1, EventKind.STEP_SKIPPED, message="100%s of %d"))
    assert caplog.messages == ["step 1: step_skipped: 100%s of %d"]


def test_a_newline_in_a_message_cannot_forge_a_line(caplog):
    """Control characters are written as escapes."""
    with caplog.at_level(logging.DEBUG, logger="hf_amp"):
        Console().write(AmpEvent(1, EventKind.STEP_SKIPPED, message="a\nstep 2: all is well\x1b[2J"))
    assert caplog.messages[-1].count("\n") == 0
    assert r"a\nstep 2: all is well\x1b[2J" in caplog.messages[-1]


@for_each("every", [1, 10])
def test_the_same_skip_again_and_again_is_told_ever_less_often(caplog, every):
    """Of 40 skips alike, in a row or not, with logged figures in between, the 1st, 2nd, 4th, … 32nd warn, with their number,
    where ten seconds lie between two of them."""
    caplog.clear()
    seconds = itertools.count(step=10)
    console = Console(clock=lambda: next(seconds))
    for step in range(every, 40 * every + 1, every):
        console.write(AmpEvent(step, EventKind.STEP_SKIPPED, Cause.LOSS, message="read the cause"))
        console.write(AmpEvent(step, EventKind.METRICS, figures={"loss": 1.0}))
    reported = [message.partition(":")[0] for message in caplog.messages]
    assert reported == [f"step {step * every}" for step in (1, 2, 4, 8, 16, 32)]
    assert caplog.messages[0].endswith("read the cause")
    assert caplog.messages[5].endswith("read the cause (32 like it so far)")


def test_fast_steps_do_not_flood(caplog):
    """Of 1,000 skips alike within 25 seconds: the first, and one after 10 and after 20 seconds, with how many there were."""
    seconds = itertools.count(step=0.025)
    console = Console(clock=lambda: next(seconds))
    for step in range(1, 1001):
        console.write(AmpEvent(step, EventKind.STEP_SKIPPED, Cause.LOSS))
    assert [message.partition(":")[0] for message in caplog.messages] == ["step 1", "step 401", "step 802"]
    assert "(802 like it so far)" in caplog.messages[2]


def test_each_new_finding_has_its_line(caplog):
    """Another cause, other modules, another precision, and what has no cause but says something else, are no repetition."""
    console = Console()
    for cause, modules in [(Cause.LOSS, ()), (Cause.INPUT, ()), (Cause.ACTIVATION, ("a",)), (Cause.ACTIVATION, ("b",))]:
        for step in range(3):
            console.write(AmpEvent(step, EventKind.STEP_SKIPPED, cause, modules=modules))
    for after in ("BF16", "FP32"):
        console.write(AmpEvent(4, EventKind.PRECISION_CHANGED, Cause.UNKNOWN, "MIXED", after))
    for lost in (3, 4, 4, 4):
        console.write(AmpEvent(5, EventKind.EVALUATION_LOST_BATCHES, message=f"{lost} lost"))
    assert len(caplog.messages) == 4 + 2 + 2
