"""`PrecisionMonitor` counts truthfully and reports only what is known."""

import json
import math
from dataclasses import fields

import pytest

from hf_amp import Cause
from hf_amp.events import StepOutcome
from hf_amp.monitoring.monitor import PrecisionMonitor
from tests.each import for_each
from tests.monitoring.outcomes import record_applied, record_skipped


@pytest.fixture
def monitor() -> PrecisionMonitor:
    return PrecisionMonitor()


def record(monitor: PrecisionMonitor, steps: str) -> None:
    """One step a letter: `a` applied, any other the first letter of the cause that it was skipped for."""
    causes = {cause.value[0].lower(): cause for cause in Cause if cause is not Cause.ACTIVATION}
    for step in steps:
        if step == "a":
            record_applied(monitor, 4.0, grad_norm=3.0, grad_amax=2.0, underflow_fraction=None)
        else:
            record_skipped(monitor, causes[step], next_scale=2.0, inf_elements=5, nan_elements=1)


def test_before_the_first_step_nothing_but_the_counts_is_known(monitor):
    """A new monitor reports zeros, and no rate, scale or norm."""
    counts = ("applied_steps", "skipped_steps", "precision_changes", "modules_in_fp32")
    assert monitor.metrics() == dict.fromkeys(counts, 0)


@for_each("steps", ["a", "s", "aaas", "sswwwua", "ssssiiillluuuaaaaaaaa"])
def test_steps_are_counted_by_what_became_of_them(steps):
    """Applied and skipped steps add up, skips add up over their causes, and the rate is the skipped share."""
    monitor = PrecisionMonitor()
    record(monitor, steps)
    figures = monitor.metrics()
    applied = steps.count("a")
    by_cause = {name: value for name, value in figures.items() if name.startswith("skipped_steps_")}
    assert figures["applied_steps"] == applied
    assert figures["skipped_steps"] == monitor.skipped_steps == sum(by_cause.values()) == len(steps) - applied
    assert figures["skip_rate"] == (len(steps) - applied) / len(steps)


@for_each("cause", Cause)
def test_a_skip_counts_for_its_cause_alone(cause):
    """The counter of the cause is there, those of other causes are absent."""
    monitor = PrecisionMonitor()
    record_skipped(monitor, cause, 2.0, inf_elements=0, nan_elements=0)
    by_cause = {name: value for name, value in monitor.metrics().items() if name.startswith("skipped_steps_")}
    assert by_cause == {f"skipped_steps_{cause.value.lower()}": 1}


def test_a_skipped_step_has_no_norm(monitor):
    """The norm of the step before is not passed off as that of the skipped one; no nan stands in for it."""
    record(monitor, "as")
    figures = monitor.metrics()
    assert {"grad_norm", "grad_amax", "headroom_bits"} & set(figures) == set()
    assert (figures["inf_elements"], figures["nan_elements"]) == (5, 1)


def test_the_scale_is_that_of_the_step_and_after_a_skip_the_next(monitor):
    """After an applied step the scale that it used; after a skip the one that was backed off to."""
    record(monitor, "a")
    assert monitor.metrics()["scale"] == 4.0
    record(monitor, "s")
    assert monitor.metrics()["scale"] == 2.0


def test_norms_come_back_with_the_next_applied_step(monitor):
    """Figures are those of the newest step that has them."""
    record(monitor, "asa")
    figures = monitor.metrics()
    assert (figures["grad_norm"], figures["grad_amax"]) == (3.0, 2.0)


def test_what_was_not_measured_is_absent(monitor):
    """With monitoring off there are counts and the scale, nothing else."""
    record_applied(monitor, 4.0, None, None, None)
    counts = {"applied_steps", "skipped_steps", "precision_changes", "modules_in_fp32"}
    assert set(monitor.metrics()) == {"scale", "skip_rate"} | counts


def test_a_norm_that_is_not_taken_is_never_the_wrong_side_of_zero(monitor):
    """Gradients that are all 0 have a norm of 0 at once, and others never have it, though the norm is not taken in these steps."""
    seen = []
    for norm, zero in (
        (2.0, False),
        (None, False),
        (None, True),
        (None, False),
        (0.0, True),
        (None, True),
        (None, False),
    ):
        monitor.after_step(StepOutcome(1, applied=True, scale=4.0, grad_norm=norm, zero_gradients=zero))
        seen.append(monitor.metrics().get("grad_norm"))
    assert seen == [2.0, 2.0, 0.0, None, 0.0, 0.0, None]


def test_a_sampled_figure_stays_until_the_next_sample(monitor):
    """The underflow fraction is taken now and then, as is the norm where nothing clips, and reported in between."""
    for sampled in (0.25, None, None):
        record_applied(monitor, 4.0, sampled, 1.0, sampled)
        assert monitor.metrics()["underflow_fraction"] == monitor.metrics()["grad_norm"] == 0.25
    record_applied(monitor, 4.0, 1.0, 1.0, math.nan)  # a sample that did not tell
    assert "underflow_fraction" not in monitor.metrics()
    record_applied(monitor, 4.0, 1.0, 1.0, 0.0)
    assert monitor.metrics()["underflow_fraction"] == 0.0


@for_each("scale", [2.0**-24, 1.0, 65536.0, 2.0**127])
@for_each("amax", [1e-30, 0.5, 3.0, 1e30])
def test_headroom_is_the_distance_to_65504_in_bits(scale, amax):
    """log2(65504 / (amax * scale)): 1 where one doubling is left, absent beyond the format."""
    monitor = PrecisionMonitor()
    record_applied(monitor, scale, amax, amax, None)
    expected = math.log2(65504) - math.log2(amax) - math.log2(scale)
    assert monitor.metrics().get("headroom_bits") == (pytest.approx(expected) if expected >= 0 else None)


def test_half_of_the_range_leaves_one_bit(monitor):
    """The unit is doublings of the scale."""
    record_applied(monitor, 2.0, grad_norm=20000.0, grad_amax=65504 / 4, underflow_fraction=None)
    assert monitor.metrics()["headroom_bits"] == pytest.approx(1.0)


def test_gradients_of_zero_have_no_headroom_to_tell(monitor):
    """An infinite distance is no number to log."""
    record_applied(monitor, 4.0, grad_norm=0.0, grad_amax=0.0, underflow_fraction=1.0)
    figures = monitor.metrics()
    assert "headroom_bits" not in figures
    assert figures["grad_norm"] == 0.0


@for_each("steps", ["", "a", "s", "aswia", "aaaassllu"])
def test_every_figure_survives_a_checkpoint(steps):
    """State goes through JSON into a new monitor, which reports the same."""
    monitor = PrecisionMonitor()
    record(monitor, steps)
    saved = json.loads(json.dumps(monitor.state_dict()))
    resumed = PrecisionMonitor()
    resumed.load_state_dict(saved)
    assert resumed == monitor
    assert resumed.metrics() == monitor.metrics()


def test_a_resumed_monitor_goes_on_counting(monitor):
    """N steps, save, load, M steps count as N + M, causes never seen before included."""
    record(monitor, "aas")
    resumed = PrecisionMonitor()
    resumed.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    for each in (monitor, resumed):
        record(each, "swa")
    assert resumed == monitor
    assert resumed.metrics()["skipped_steps_scale"] == 2


def test_the_state_is_a_copy(monitor):
    """A saved state does not change with the steps that follow, nor does the monitor with the state."""
    record(monitor, "s")
    saved = monitor.state_dict()
    record(monitor, "s")
    assert saved["skipped_by_cause"] == {"SCALE": 1}
    resumed = PrecisionMonitor()
    resumed.load_state_dict(saved)
    record(resumed, "s")
    assert saved["skipped_by_cause"] == {"SCALE": 1}


@for_each("missing", [field.name for field in fields(PrecisionMonitor)])
def test_a_state_without_a_field_leaves_it_as_it_is(missing):
    """A checkpoint of an older version loads."""
    monitor = PrecisionMonitor()
    record(monitor, "aws")
    before = getattr(monitor, missing)
    other = PrecisionMonitor()
    record(other, "alla")
    state = other.state_dict()
    del state[missing]
    monitor.load_state_dict(state)
    assert getattr(monitor, missing) == before
    rest = [field.name for field in fields(PrecisionMonitor) if field.name != missing]
    assert all(getattr(monitor, name) == getattr(other, name) for name in rest)


def test_a_scale_that_stands_still_is_not_volatile(monitor):
    """The spread of log2(scale): 0 while it stays, 1 bit where half of the steps have 4 times the scale of the others."""
    record_applied(monitor, 4.0, 1.0, 1.0, None)
    assert "scale_volatility_bits" not in monitor.metrics()
    record_applied(monitor, 4.0, 1.0, 1.0, None)
    assert monitor.metrics()["scale_volatility_bits"] == 0.0
    for _ in range(2):
        record_applied(monitor, 16.0, 1.0, 1.0, None)
    assert monitor.metrics()["scale_volatility_bits"] == pytest.approx(1.0)


def test_memory_saving_is_told_once_it_is_known(monitor):
    """And may be negative."""
    assert "memory_saving_fraction" not in monitor.metrics()
    monitor.record_memory(-0.05)
    assert monitor.metrics()["memory_saving_fraction"] == -0.05


def test_a_gradient_beyond_fp16_in_an_applied_step_has_no_headroom_to_tell(monitor):
    """It cannot have been held in FP16; at the limit itself there are 0 bits left."""
    for amax, reported in ((65504.0 / 4, True), (65504.0, False)):
        record_applied(monitor, 4.0, 1.0, amax, None)
        assert ("headroom_bits" in monitor.metrics()) is reported
