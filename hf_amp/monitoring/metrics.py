"""The catalogue: every metric that hf_amp reports, once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from hf_amp.events import Cause

LOG_PREFIX = "amp/"
"""Stands before a metric's name in Trainer logs and trackers."""
INCIDENT = "amp_incident"
"""Key of a log entry's words for what needed attention; apart from `amp/`, under which there are only numbers."""


class Metric(NamedTuple):
    """One metric."""

    name: str
    unit: str
    meaning: str
    remedy: str
    """What to do when it is bad."""
    read: str = "every step"
    """When it is taken."""


CATALOGUE: tuple[Metric, ...] = (
    Metric("scale", "1", "loss scale that the newest step used; after a skip, the one that the next step will use", "falls without end: the overflow is not the scale's; read the cause of the skips"),
    Metric("scale_volatility_bits", "bits", "standard deviation of log2(scale) over all steps of the run", "above 2 after the first steps: gradients change their size; ADAPTIVE follows them"),
    Metric("applied_steps", "steps", "optimizer steps applied since the run began", "stands still: read the cause"),
    Metric("skipped_steps", "steps", "optimizer steps skipped since the run began", "more than a few: read the cause"),
    *(
        Metric(f"skipped_steps_{cause.lower()}", "steps", f"skipped because {cause.facts.in_words}", cause.facts.remedy)
        for cause in Cause
    ),
    Metric("skip_rate", "1", "skipped share of all optimizer steps", "above 0.01 after the first steps: read the cause"),
    Metric("grad_norm", "1", "2-norm of the unscaled gradients before clipping; absent when the step was skipped", "jumps: lower the learning rate or clip", "every step; every monitoring_interval where nothing clips and the amax gives the verdict: ADAPTIVE, PERFORMANCE_OPTIMIZED, several processes"),
    Metric("grad_amax", "1", "largest magnitude among the unscaled gradients", "jumps: as grad_norm", "every monitoring_interval steps; in ADAPTIVE, every step"),
    Metric("headroom_bits", "bits", "log2(largest FP16 value / (grad_amax * scale)), as of the newest grad_amax; absent where that gradient is not held in FP16, as in a module that a plan runs in FP32", "below 1: an overflow is near; above 12: the scale could grow", "with grad_amax"),
    Metric("underflow_fraction", "1", "share of scaled gradient elements that FP16 has made subnormal or zero, from a sample; zeros count as far as the sizes of the others say that FP16 has made them, not those of rows that no token asks for; absent where the two cannot be told apart, as at a scale so low that most of the gradient is zero", "above 0.1 and rising: raise the scale", "every monitoring_interval steps"),
    Metric("lost_update_fraction", "1", "share of the updates of FP16 and BF16 parameter elements that rounding lost: elements that the optimizer did not change, of those with a gradient, from a sample; absent where it moves FP32 parameters, or `half_parameters` keeps updates", "above 0.5: the updates are smaller than half a rounding step; half_parameters='stochastic_rounding', 'kahan', 'upcast' or 'master_weights'", "every monitoring_interval applied steps, reported a step later"),
    Metric("fp8_output_error", "1", "what FP8 by torchao changes of the model's outputs, as a share of their size, against the precision around it; of one batch", "the event `fp8_damage` names layers that `fp32_modules` should leave out of it", "once, after the second step"),
    Metric("non_finite_losses", "losses", "micro-batches whose loss was not finite since the run began, on the worst process", "look at the data and the loss function"),
    Metric("non_finite_loss_fraction", "1", "the same as a share of the micro-batches since the newest log entry of a Trainer, whose logged loss leaves them out", "above 0: the logged loss looks better than it is", "when logged"),
    Metric("eval_non_finite_batches", "batches", "evaluation batches of all processes whose loss was not finite, in the newest evaluation", "eval_loss is the mean of the others: look at the data, or at activations beyond 65504", "evaluations"),
    Metric("inf_elements", "elements", "infinite gradient elements in the newest skipped step", "read the cause", "skipped steps"),
    Metric("nan_elements", "elements", "NaN gradient elements in the newest skipped step", "read the cause", "skipped steps"),
    Metric("precision_changes", "changes", "changes of the precision plan since the run began", "one after another: read the events", "every change"),
    Metric("rewinds", "times", "how often the run has gone back to a good checkpoint, with `on_stalled=\"rewind\"`", "again and again: read the events, lower the learning rate", "every step"),
    Metric("modules_in_fp32", "modules", "modules that the plan runs in FP32 inside of a half-precision run", "most of the model: train in BF16", "every change"),
    Metric("fp16_seconds", "s", "time of steps in a run whose default was FP16 then, pauses left out; a resumed run adds to it", "small beside fp32_seconds: the run has fallen back"),
    Metric("bf16_seconds", "s", "the same for BF16", "as fp32_seconds, where it is not what you asked for"),
    Metric("fp32_seconds", "s", "the same for FP32", "large in a half-precision run: read the changes of precision"),
    Metric("step_seconds", "s", "time from one optimizer step to the next, median of the newest nine", "rises: look at the data loader, at modules_in_fp32 and at memory_bytes"),
    Metric("samples_per_second", "samples/s", "rows of all batches of all processes in a step, through step_seconds; in a Trainer", "falls: as step_seconds"),
    Metric("memory_saving_fraction", "1", "share of training memory that precision saves over FP32, as the calibration step of `hf_amp.training` estimates it; negative where precision costs memory", "below 0: casts outweigh what is saved; a larger batch, or FP32", "once"),
    Metric("joules_per_step", "J", "energy of the CUDA device, or of the CPU packages with all that runs on them, since training began, through the steps applied since; absent where nothing counts it (NVML by `pynvml`; RAPL where it may be read)", "rises: as step_seconds; skipped steps cost too", "when logged"),
    Metric("memory_bytes", "B", "most memory that PyTorch had allocated at once on the CUDA device that trains, or on the fullest of several", "near the device's: smaller batches or gradient checkpointing", "when logged"),
)  # fmt: skip

BY_MODULE: tuple[Metric, ...] = (
    Metric("module_headroom_bits", "bits", "headroom_bits of the module's own parameters, with `monitor_modules`", "below 1 in one module alone: it will overflow first", "every monitoring_interval steps"),
    Metric("module_underflow_fraction", "1", "underflow_fraction of the module's own parameters, likewise", "near 1: what this module learns is lost", "every monitoring_interval steps"),
    Metric("module_activation_amax", "1", "largest magnitude in the module's output, likewise; modules without children", "near 65504: it will leave FP16's range", "every monitoring_interval steps"),
    Metric("module_lost_update_fraction", "1", "lost_update_fraction of every FP16 or BF16 parameter, likewise; by the parameter's name", "1: it stands still; `frozen` says so, and what keeps its updates", "with lost_update_fraction"),
)  # fmt: skip
"""Figures that every module has; in the log, the report and `session.module_metrics()`, not among a Trainer's scalars."""

BRIEF = ("scale", "skipped_steps", "grad_norm", "headroom_bits", "underflow_fraction")
"""What an entry of `log_history` holds, where known, and as much of the next as makes it six, of what is not zero."""
BRIEF_WHERE_NOT_ZERO = (
    "rewinds", "modules_in_fp32", "non_finite_loss_fraction", "lost_update_fraction", "precision_changes",
    *(f"skipped_steps_{cause.lower()}" for cause in Cause), "eval_non_finite_batches",
)  # fmt: skip
MOST_IN_BRIEF = 6


def in_brief(figures: Mapping[str, float]) -> dict[str, float]:
    """At most six of the catalogue's `figures`: how the run is."""
    shown = [name for name in BRIEF if name in figures]
    shown += [name for name in BRIEF_WHERE_NOT_ZERO if figures.get(name)]
    return {name: figures[name] for name in shown[:MOST_IN_BRIEF]}


NAMES = frozenset(metric.name for metric in CATALOGUE)
