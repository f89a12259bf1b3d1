"""Events: frozen records of a closed list of kinds."""

import dataclasses

import pytest

from hf_amp import AmpEvent, Cause, EventKind
from tests.each import for_each

AS_EXPECTED = {
    EventKind.ATTACHED, EventKind.DETACHED, EventKind.MASTER_WEIGHTS_KEPT, EventKind.METRICS, EventKind.BUFFERS_RESTORED,
    EventKind.UPDATES_ROUNDED, EventKind.CHECKPOINT_GOOD, EventKind.FP8_MEASURED, EventKind.TRAINING_STARTED, EventKind.TRAINING_ENDED,
    EventKind.RANKS_PARTED,
}  # fmt: skip


@for_each("field", [field.name for field in dataclasses.fields(AmpEvent)])
def test_an_event_is_frozen(field):
    """What happened cannot be rewritten."""
    event = AmpEvent(step=3, kind=EventKind.STEP_SKIPPED)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(event, field, None)


def test_an_event_without_details_claims_none():
    """Only step and kind are required; the rest says that nothing went wrong and nothing changed."""
    event = AmpEvent(0, EventKind.ATTACHED)
    assert (event.cause, event.before, event.after, event.modules) == (None, None, None, ())
    assert (event.message, event.figures) == ("", {})


def test_events_do_not_share_figures():
    """Figures put into one event do not appear in the next."""
    first, second = AmpEvent(1, EventKind.ATTACHED), AmpEvent(2, EventKind.ATTACHED)
    first.figures["scale"] = 2.0
    assert second.figures == {}


def test_equal_events_are_equal():
    """An event is its content."""
    made = [AmpEvent(4, EventKind.STEP_SKIPPED, Cause.SCALE, 4.0, 2.0, ("lm_head",), "text") for _ in range(2)]
    assert made[0] == made[1]
    assert dataclasses.replace(made[0], step=5) != made[1]


@for_each("kind", EventKind)
def test_only_trouble_needs_attention(kind):
    """What went wrong asks for attention; starting and ending do not."""
    assert kind.needs_attention == (kind not in AS_EXPECTED)


@for_each("member", [*Cause, *EventKind])
def test_causes_and_kinds_are_plain_strings(member):
    """They compare equal to what a log holds, and are found again by it."""
    assert member == member.value
    assert type(member)(member.value) is member


def test_the_causes_are_the_ones_of_the_design():
    """Ten causes, no more."""
    assert set(Cause.__members__) == {
        "SCALE",
        "ACTIVATION",
        "INPUT",
        "WEIGHTS",
        "BUFFER",
        "LOSS",
        "DERIVATIVE",
        "ROUNDING",
        "MODEL",
        "UNKNOWN",
    }
