"""A training step of a model in formats that this machine does not have, by emulation: what would leave their range."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from hf_amp.emulation import EmulatedPrecision
from hf_amp.fallback.apply import CurrentPrecision, PlanRunner, PrecisionEntry
from hf_amp.fallback.locate import float_tensors, locate
from hf_amp.fallback.plan import PrecisionPlan
from hf_amp.fallback.recorder import RecordedForward
from hf_amp.precision import BF16_FORMAT, FP16_FORMAT, NumberFormat, PrecisionMode
from hf_amp.statistics import snapshot

FORMATS = (
    FP16_FORMAT,
    BF16_FORMAT,
    NumberFormat("FP8 E4M3", torch.float8_e4m3fn),
    NumberFormat("FP8 E5M2", torch.float8_e5m2),
)
UNDERFLOW_TO_TELL = 0.1
"""The catalogue's limit for `underflow_fraction`."""
FIRST_SCALE, SMALLEST_SCALE = 2.0**16, 2.0**-24


@dataclass(frozen=True)
class EmulatedEntry(PrecisionEntry):
    """Enters one format by emulation, whichever half precision is asked for, and FP32 for FP32."""

    device_type: str = "cpu"
    emulate: bool = True
    number_format: NumberFormat = FP16_FORMAT

    def context(self, precision: PrecisionMode) -> AbstractContextManager[Any]:
        exact = precision is PrecisionMode.FP32
        return EmulatedPrecision(NumberFormat.of(precision) if exact else self.number_format)


@dataclass
class DryRun:
    """What a step in one format would be like.

    Attributes:
        number_format: whose range is in question.
        overflowing: modules whose output leaves its range although their inputs are in it; "" is the model's own forward.
        unsound: a module whose output is not finite in FP32 either; None where there is none.
        scale: a loss scale with which the gradients are finite, with those modules in FP32; None where there is none.
        underflow_fraction: share of gradient elements that are lost at that scale, of those that are not zero in FP32; None where
            there is no such scale.
        underflowing: module → the same, where it is above 0.1, worst first.
        error: why it could not be run; None where it could.
    """

    number_format: NumberFormat
    overflowing: list[str] = field(default_factory=list)
    unsound: str | None = None
    scale: float | None = None
    underflow_fraction: float | None = None
    underflowing: dict[str, float] = field(default_factory=dict)
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        plain = {option.name: getattr(self, option.name) for option in fields(self)}
        return {**plain, "number_format": self.number_format.name, "saved_by": self.saved_by}

    @property
    def saved_by(self) -> str:
        """The plan that would save a run in this format, in words."""
        if self.error is not None or self.unsound is not None:
            return "none: mend the model or the batch first"
        if self.scale is None:
            return "none: the gradients overflow at every scale; use another format"
        if "" in self.overflowing:
            return "the whole model in FP32 or BF16"
        if self.overflowing:
            count = len(self.overflowing)
            by_itself = ": hf_amp does that" if self.number_format is FP16_FORMAT else ""
            return f"{count} module{'s' if count > 1 else ''} in FP32{by_itself}"
        if (self.underflow_fraction or 0.0) > UNDERFLOW_TO_TELL:
            return "nothing overflows, but much is lost: a format of wider range"
        return "nothing needed"


def dry_runs(model: nn.Module, batch: Mapping[str, Tensor]) -> Iterator[DryRun]:
    """One forward and backward of `model` on `batch` in each format, by emulation on the CPU. Nothing of the model changes.

    FP8 is cast without a scale for each tensor, which real FP8 recipes have; so its figures are the worst case.

    Args:
        model: in FP32.
        batch: arguments of the model by name.
    """
    exact = gradients_of(model, batch, CurrentPrecision(EmulatedEntry(), PrecisionMode.FP32), 1.0)
    for number_format in FORMATS:
        entry = EmulatedEntry(number_format=number_format)
        forward = RecordedForward(model, (), dict(batch))
        findings = locate(forward, CurrentPrecision(entry, PrecisionMode.MIXED))
        result = DryRun(number_format, findings.overflowing, findings.unsound, error=findings.error)
        if result.error is None and result.unsound is None:
            _backward(model, batch, entry, exact, result)
        yield result


def _backward(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    entry: EmulatedEntry,
    exact: Mapping[str, Tensor],
    result: DryRun,
) -> None:
    """With the overflowing modules in FP32, looks for a scale, the largest first, and for what is lost with it."""
    runner = PlanRunner(entry, PrecisionMode.MIXED)
    runner.adopt(model)
    in_fp32 = dict.fromkeys(result.overflowing, PrecisionMode.FP32)
    runner.apply(PrecisionPlan(PrecisionMode.MIXED, in_fp32))
    scale = FIRST_SCALE if entry.number_format is not BF16_FORMAT else 1.0
    try:
        while exact and scale >= SMALLEST_SCALE:
            gradients = gradients_of(model, batch, runner.current, scale)
            flags = {name: gradient.isfinite().all() for name, gradient in gradients.items()}
            if all(snapshot.read(flags).values()):
                result.scale = scale
                _note_underflow(gradients, exact, result)
                return
            scale /= 2
    finally:
        runner.remove()


def gradients_of(
    model: nn.Module, batch: Mapping[str, Tensor], precision: CurrentPrecision, scale: float
) -> dict[str, Tensor]:
    """Name of a parameter → its gradient of the scaled loss; the model's own are left empty."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same dropout in every format
        with precision():
            loss = _loss(model(**batch))
    (loss * scale).backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients


def _loss(output: Any) -> Tensor:
    """The model's own loss; without one, the mean square of all that it returns."""
    loss = getattr(output, "loss", None)
    if loss is not None:
        return torch.as_tensor(loss)
    return torch.stack([x.float().square().mean() for _, x in float_tensors(output) if x.requires_grad]).sum()


def _note_underflow(gradients: Mapping[str, Tensor], exact: Mapping[str, Tensor], result: DryRun) -> None:
    """What of the gradient is zero or subnormal; elements that are zero in FP32 as well, and so lose nothing, left out."""
    counts: dict[str, Tensor] = {}
    for name, gradient in gradients.items():
        there = exact[name] != 0
        small = gradient.abs() < result.number_format.smallest_normal
        counts[f"lost {name}"], counts[f"there {name}"] = (small & there).sum(), there.sum()
    host = snapshot.read(counts)
    lost: Counter[str] = Counter()
    there_by_module: Counter[str] = Counter()
    for name in gradients:
        module = name.rpartition(".")[0]
        lost[module] += int(host[f"lost {name}"])
        there_by_module[module] += int(host[f"there {name}"])
    result.underflow_fraction = lost.total() / max(1, there_by_module.total())
    shares = {module: lost[module] / count for module, count in there_by_module.items() if count}
    told = {module: share for module, share in shares.items() if share > UNDERFLOW_TO_TELL}
    result.underflowing = dict(sorted(told.items(), key=lambda item: -item[1]))
