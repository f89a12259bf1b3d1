"""The catalogue of metrics is complete, and says something about each."""

import itertools

from hf_amp import Cause, MixedPrecisionConfig
from hf_amp.events import StepOutcome
from hf_amp.monitoring.metrics import BRIEF, BY_MODULE, CATALOGUE, LOG_PREFIX, NAMES, in_brief
from hf_amp.monitoring.monitor import PrecisionMonitor
from hf_amp.monitoring.rewind import Rewinder
from hf_amp.monitoring.throughput import ThroughputMonitor
from hf_amp.precision import BF16_FORMAT, FP16_FORMAT, FP32_FORMAT
from tests.each import for_each
from tests.monitoring.outcomes import record_applied, record_skipped


def full_monitor(cause: Cause) -> PrecisionMonitor:
    """A monitor that has a value for everything, with one step skipped for `cause`."""
    monitor = PrecisionMonitor()
    record_skipped(monitor, cause, 2.0, inf_elements=1, nan_elements=1)
    record_applied(monitor, 2.0, grad_norm=1.0, grad_amax=0.5, underflow_fraction=0.1)
    monitor.after_step(
        StepOutcome(1, True, 4.0, grad_norm=1.0, losses=4, non_finite_losses=1, lost_update_fraction=0.5)
    )
    monitor.eval_non_finite_batches, monitor.fp8_output_error = 1, 0.03
    monitor.record_memory(0.25)
    return monitor


def full_pace() -> ThroughputMonitor:
    """A pace that knows everything: steps in every format, and how many samples a step has."""
    throughput = ThroughputMonitor(device="cpu", clock=itertools.count().__next__)
    throughput.samples_per_step = 8
    for number_format in (FP16_FORMAT, FP16_FORMAT, BF16_FORMAT, FP32_FORMAT):
        throughput.step_decided(number_format.name)
    return throughput


def test_no_metric_is_listed_twice():
    """A name means one thing."""
    names = [metric.name for metric in CATALOGUE]
    assert len(names) == len(set(names)) == len(NAMES)


@for_each("metric", CATALOGUE + BY_MODULE)
def test_every_metric_is_explained(metric):
    """Unit, meaning and remedy are there; the name is one that loggers and attribute access take."""
    assert metric.unit.strip()
    assert len(metric.meaning.split()) > 2
    assert len(metric.remedy.split()) > 2
    assert metric.name.isidentifier()
    assert metric.name == metric.name.lower()


@for_each("cause", Cause)
def test_whatever_the_monitor_reports_is_in_the_catalogue(cause):
    """No figure is logged that the catalogue does not explain, whatever the cause of a skip."""
    assert set(full_monitor(cause).metrics()) - NAMES == set()


def test_whatever_is_in_the_catalogue_can_be_reported():
    """No metric is promised that the monitor never gives."""
    reported = {name for cause in Cause for name in full_monitor(cause).metrics()}
    reported |= set(full_pace().metrics()) | {"memory_bytes", "joules_per_step"}  # where the hardware counts
    reported |= set(Rewinder(MixedPrecisionConfig(on_stalled="rewind")).metrics())
    assert reported >= NAMES


def test_no_metric_has_the_name_of_an_event_field():
    """Metrics are written into event lines beside the event's own keys, and must not collide with them."""
    keys = {"timestamp", "level", "event", "run_id", "rank", "step", "kind"}
    keys |= {"cause", "before", "after", "modules", "message", "figures"}
    assert keys & NAMES == set()


def test_the_log_prefix_makes_a_group():
    """TensorBoard and W&B group by what stands before a slash."""
    assert LOG_PREFIX == "amp/"


def test_an_entry_in_brief_has_six_at_most() -> None:
    """The five that say how a run is, and one more; what is zero is none."""
    brief = in_brief(dict.fromkeys(NAMES, 1.0))
    assert list(brief) == [*BRIEF, "rewinds"]
    assert list(in_brief({**dict.fromkeys(NAMES, 0.0), "precision_changes": 2.0})) == [*BRIEF, "precision_changes"]
