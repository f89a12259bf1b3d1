"""What one step boundary does: gradients are checked on their device, decided on in one GPU-CPU sync, and kept until their step.

`check` makes a `GradientStep` of an optimizer's gradients, `GradientStep.to_host` makes a `StepOutcome` of that, and
`PendingSteps` knows which optimizers have one open, and what becomes of gradients that wait while others step.
"""

from __future__ import annotations

import enum
import math
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from hf_amp.errors import ScalerError
from hf_amp.events import StepOutcome
from hf_amp.precision import FP16_FORMAT, FP32_FORMAT
from hf_amp.scaling.policies import Observation, scalar
from hf_amp.statistics import (
    PendingTransfer,
    all_reduce_max,
    argument,
    by_device_and_dtype,
    collect,
    copies_of,
    count_non_finite,
    elements_of,
    exact_norm,
    held_by,
    is_distributed,
    local_part,
    norm_and_amax,
    reciprocal,
    sample_underflow,
    to_device,
    to_host,
    total_amax,
    underflow_fraction,
)

EXTRA = "extra "
"""Stands before the names of what step hooks want read along."""
LEFT_OUT = 2.0
"""What a rank that has left its step out says of its loss, plus its number. Others say 0 or 1."""


class Unscale(enum.Enum):
    """How gradients are divided by the scale."""

    IN_PLACE = "in place"
    """At once, so that the caller can look at them or clip them."""
    FUSED = "fused"
    """They stay scaled: whatever applies them divides by the scale, and clips, on the way."""
    NONE = "none"
    """They are not scaled (BF16, FP32): they are only checked."""


class StepState(enum.Enum):
    """How far a `GradientStep` has come."""

    CHECKED = "checked"
    """Its optimizer has not stepped, and no update has seen it."""
    STEPPED = "stepped"
    """Its optimizer's step is decided; the next update ends it."""
    LEFT_OVER = "left over"
    """An update has seen it, and its optimizer has not stepped."""


@dataclass(frozen=True)
class StatisticsRequest:
    """What `check` is to find out beyond whether all is finite.

    Attributes:
        amax: the largest magnitude, which makes `found_inf` exact; otherwise it is inferred from the norm.
        sample_seed: the underflow fraction, from a sample with this seed; None for not.
        agree: exchange what is local to a rank with the other ranks.
        norm: the 2-norm, which is there in any case in a sampled step, and where nothing asks for the amax.
        not_sampled: `id` of the parameters that the format does not bound, because their modules run in FP32: neither underflow
            nor what a policy takes for the largest gradient is looked for in them.
        order: the parameters in the order that the norm sums them in; empty for the optimizer's.
        left_out: this rank takes no such step, and says so to the others; its amax is -1.
    """

    amax: bool
    sample_seed: int | None
    agree: bool
    norm: bool = False
    not_sampled: Collection[int] = ()
    order: Sequence[Tensor] = ()
    left_out: bool = False


@dataclass
class GradientStep:
    """What is known of one optimizer's gradients, from their check until the update after their step.

    All tensors have shape [] and are float32, on `device`, but for the scale, which is on the CPU.
    """

    backward: int
    """Number of the backward that made the gradients."""
    scale: Tensor
    """The scale which that backward used."""
    device: torch.device
    """Where the figures are."""
    gradients: list[Tensor]
    unscale: Unscale
    found_inf: Tensor
    """Above 0 where an element is not finite."""
    losses: int
    """Losses (micro-batches) behind the gradients that the scaler saw, and that no other step has reported."""
    loss_flags: Tensor | None
    """NaN for each that was not finite, 0 for the others: shape [] or [n]; one for the worst where ranks agree. None for no loss."""
    norm: Tensor | None
    """2-norm of the unscaled gradients, before clipping. There is a norm, or an amax, or both."""
    amax: Tensor | None
    """Largest magnitude of the unscaled gradients."""
    bounded_amax: Tensor | None
    """The same of the parameters that FP16 bounds, where a plan runs modules in FP32 and a policy asks for the largest."""
    underflow: Tensor | None
    """Elements by size, in a sample: the counts of `statistics.Underflow`, shape [5]."""
    wanted_scale: Tensor | None
    """The scale at which hardly any element would underflow; 0 where none is seen."""
    found_while_dividing: Tensor | None
    """What the unscaling kernel itself found, which stands whatever the caller makes of the gradients since."""
    inferred: bool
    """Whether `found_inf` was inferred from a norm, whose FP32 sum of squares can overflow by itself, and can be taken again."""
    agrees: bool
    """Whether the verdict is that of all ranks."""
    has_gradients: bool
    """Whether any parameter had a gradient."""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """What step hooks want read along: tensors of shape [] or [n]."""
    state: StepState = StepState.CHECKED
    outcome: StepOutcome | None = None
    """None until the host knows it."""
    host: Mapping[str, float] = field(default_factory=dict)
    """The figures; empty until then."""
    clip_coefficient: Tensor | None = None
    """What a fused clip multiplies the unscaled gradients by."""
    max_norm: float = math.inf
    """What a fused clip limits the norm to."""
    amax_is_scaled: bool = False
    """Whether `amax` is that of the scaled gradients all the same, which the host divides."""
    sharded: bool = False
    """Whether some of the gradients are shards."""
    versions_clipped: int | None = None
    """Writes to the gradients when they were clipped in place; None where they were not."""
    skipped_on_device: bool = False
    """Whether an optimizer that was given `found_inf` has done nothing."""
    cleared: Tensor | None = None
    """Whether they were all 0 before the first backward after them."""
    versions: int | None = None
    """Writes to the gradients, by autograd's own counter, until the first backward after them; None before it."""

    @property
    def known_clean(self) -> bool:
        """Whether the host knows the gradients to be finite, some to be other than 0, and the losses to be finite."""
        known = self.outcome
        has_updates = known is not None and known.applied and known.has_gradients and not known.zero_gradients
        return has_updates and not (known and known.non_finite_losses)

    def figures(self) -> dict[str, Tensor]:
        """What the host wants to know, by name."""
        names = ("found_inf", "scale", "loss_flags", "norm", "amax", "bounded_amax", "underflow", "wanted_scale")
        extras = {EXTRA + name: value for name, value in self.extras.items()}
        return {**{name: value for name in names if (value := getattr(self, name)) is not None}, **extras}

    def to_host(self, attempt: int, transfer: PendingTransfer | None = None) -> StepOutcome:
        """What is to become of the step. One GPU-CPU sync, for `transfer` of its figures alone; more where it overflowed."""
        host = to_host(self.figures()) if transfer is None else transfer.result()
        self.skipped_on_device = bool(host["found_inf"])
        counts = count_non_finite(self.gradients) if host["found_inf"] else None
        if counts and self.inferred and not _is_left_out(host) and (self.agrees or not any(counts)):
            self._verify()
            host = to_host(self.figures())
        if not host["found_inf"] and not math.isfinite(host.get("norm", 0.0)) and not self.sharded:
            self._recompute_norm()
            host = to_host(self.figures())
        return self.outcome_from(attempt, host, counts if host["found_inf"] else None)

    def outcome_from(self, attempt: int, host: Mapping[str, float], counts: tuple[int, int] | None) -> StepOutcome:
        """The outcome that `figures`, once they are on the host, stand for. `counts`: infinite elements, and NaN."""

        def finite(name: str) -> float | None:
            value = host.get(name, math.nan)
            return value if math.isfinite(value) else None

        applied = host["found_inf"] == 0
        if self.amax_is_scaled and "amax" in host:
            amax = host["amax"] / host["scale"]
            host = {**host, "amax": amax if amax <= FP32_FORMAT.largest else math.inf}
        self.host = host
        sizes = elements_of(host, "underflow") if "underflow[0]" in host else None
        flags = [host["loss_flags"]] if "loss_flags" in host else elements_of(host, "loss_flags")
        bad_losses = sum(map(math.isnan, flags)) if flags else None
        self.outcome = StepOutcome(
            attempt=attempt,
            applied=applied,
            scale=host["scale"],
            backward=self.backward,
            loss_finite=None if bad_losses is None else bad_losses == 0,
            losses=self.losses,
            non_finite_losses=min(bad_losses or 0, self.losses),
            zero_gradients=self.has_gradients and 0 in (host.get("norm"), host.get("amax")),
            has_gradients=self.has_gradients,
            grad_norm=finite("norm") if applied else None,
            grad_amax=finite("amax") if applied else None,
            underflow_fraction=None if sizes is None else underflow_fraction(sizes),
            lost_update_fraction=finite(EXTRA + "lost_update_fraction"),
            inf_elements=counts[0] if counts else None,
            nan_elements=counts[1] if counts else None,
            left_out_by=None if applied or not _is_left_out(host) else int(host["loss_flags"] - LEFT_OUT),
            extras={name.removeprefix(EXTRA): v for name, v in host.items() if name.startswith(EXTRA)},
        )
        return self.outcome

    def clip(self, max_norm: float) -> Tensor:
        """Fuses a clip into what will apply the gradients. Returns their norm before it, unscaled; no GPU-CPU sync.

        Source of the coefficient: `torch.nn.utils.clip_grads_with_norm_`. A norm that is inf skips the step, or `to_host` takes
        it again.
        """
        norm = before = cast(Tensor, self.norm)
        if self.clip_coefficient is not None:
            before = norm * self.clip_coefficient
        self.max_norm = min(self.max_norm, max_norm)
        if math.isfinite(self.max_norm):
            self.clip_coefficient = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
        return before

    def clip_in_place(self, max_norm: float) -> Tensor:
        """Divides the gradients by the scale and clips them at once. Returns their norm before it, unscaled; no GPU-CPU sync."""
        norm, factor = cast(Tensor, self.norm), scalar(1.0)
        if self.unscale is Unscale.FUSED:
            refuse_fp16(self.gradients)
            factor = reciprocal(self.scale)
        if math.isfinite(max_norm):  # in this order no rounding differs from dividing first
            coefficient = (norm + 1e-6).reciprocal_() * argument(factor * max_norm, norm.device)
            multiply_(self.gradients, coefficient.clamp_(max=argument(factor, norm.device)))
        else:
            multiply_(self.gradients, factor)
        self.unscale, self.inferred = Unscale.IN_PLACE, False
        self.versions_clipped = _versions(self.gradients)
        return norm

    def multiply_in(self) -> None:
        """Divides the gradients by the scale, and clips them, where a fused optimizer does not. No GPU-CPU sync."""
        refuse_fp16(self.gradients)
        factor = reciprocal(self.scale)
        if self.clip_coefficient is not None:
            factor = self.clip_coefficient * factor
        multiply_(self.gradients, factor)
        self.unscale = Unscale.IN_PLACE  # also for a second call, after one that raised

    def was_written_to(self) -> bool:
        """Whether somebody has written into gradients that were clipped in place."""
        return self.versions_clipped is not None and self.versions_clipped != _versions(self.gradients)

    def recheck(self, optimizer: torch.optim.Optimizer) -> None:
        """Looks at the gradients again, for what has happened to them since; one more read of them, no GPU-CPU sync."""
        if self.inferred:
            self._verify()
        self.gradients = collect(optimizer)
        found = not_finite(total_amax(self.gradients, self.device))
        if self.agrees:
            found = cast(Tensor, _agreed(found)[0])
        self.found_inf = torch.maximum(self.found_inf, found)

    def verdict(self) -> Tensor:
        """`found_inf`, exact. No GPU-CPU sync."""
        if self.inferred and self.state is not StepState.STEPPED:
            self._verify()
        return self.found_inf

    def _verify(self) -> None:
        """Takes a `found_inf` that was inferred from the norm again from the amax, which is exact."""
        self.amax = total_amax(self.gradients, self.device)
        if self.unscale is Unscale.FUSED:
            self.amax = self.amax * reciprocal(self.scale)
        self.found_inf = not_finite(self.amax)
        if self.found_while_dividing is not None:
            self.found_inf = torch.maximum(self.found_inf, self.found_while_dividing)
        if self.agrees:
            self.found_inf, self.amax = cast("list[Tensor]", _agreed(self.found_inf, self.amax)[:2])
        self.inferred = self.amax_is_scaled = False

    def _recompute_norm(self) -> None:
        """Takes a norm whose FP32 sum of squares was inf again, within its range, and the clip that it led to. Slow, rare."""
        exact = exact_norm(self.gradients, self.device)
        if self.unscale is Unscale.FUSED:
            exact = exact * reciprocal(self.scale)
        cast(Tensor, self.norm).copy_(exact)  # in place: the caller of clip holds it
        if self.clip_coefficient is not None:
            self.clip_coefficient = None
            self.clip(self.max_norm)


class PendingOutcome(NamedTuple):
    """The outcome of a step whose optimizer decides on the device, on its way to the host."""

    attempt: int
    record: GradientStep
    optimizer: torch.optim.Optimizer
    transfer: PendingTransfer

    def outcome(self) -> StepOutcome:
        """The outcome; waits for the device where it has not arrived. What was not finite has not been counted."""
        return self.record.outcome_from(self.attempt, self.transfer.result(), None)


class LateUpdate(NamedTuple):
    """An update whose steps the device decides: the host learns of them before it checks the next gradients.

    Until then the next scale is on the device, one of two that the host knows.
    """

    pending: list[PendingOutcome]
    records: list[GradientStep]
    scale: Tensor
    """On the device: `after_clean`, or `after_overflow` where one of the records is not finite."""
    after_clean: Tensor
    after_overflow: Tensor

    @classmethod
    def choose(
        cls, pending: list[PendingOutcome], records: list[GradientStep], after_clean: Tensor, after_overflow: Tensor
    ) -> LateUpdate:
        """The update, with the next scale chosen on the device. No GPU-CPU sync."""
        found = [record.found_inf for record in records]
        worst = found[0] if len(found) == 1 else torch.stack([to_device(f, found[0].device) for f in found]).amax()
        lower = after_clean - after_overflow
        if worst.device.type != "cpu" and (after_clean - lower).item() == after_overflow.item():  # in one kernel
            chosen = torch.rsub(worst, after_clean.item(), alpha=lower.item())
        else:
            low, high = (to_device(x, worst.device) for x in (after_overflow, after_clean))
            chosen = torch.where(worst > 0, low, high)
        return cls(pending, records, chosen, after_clean, after_overflow)


def check(
    optimizer: torch.optim.Optimizer,
    *,
    backward: int,
    scale: Tensor,
    device: torch.device,
    unscale: Unscale,
    losses: int,
    loss_flags: Tensor | None,
    request: StatisticsRequest,
) -> GradientStep:
    """Finds out what `optimizer`'s gradients are; divides them on the way. No GPU-CPU sync.

    Sharded gradients (DTensors) are always divided in place, and their verdict is that of all shards.

    Args:
        scale: on the CPU, so that what is divided by it gets it as the argument of a kernel.
        device: where the figures will be.

    Raises:
        ScalerError: they are to be divided and one is FP16: that would round away what scaling has saved.
    """
    kinds = {type(p.grad) for group in optimizer.param_groups for p in group["params"]}
    sharded = any(hasattr(kind, "to_local") for kind in kinds)
    if sharded and unscale is Unscale.FUSED:
        unscale = Unscale.IN_PLACE
    gradients = collect(optimizer, order=request.order)
    inverse = scale if unscale is Unscale.NONE else reciprocal(scale)
    underflow = wanted = None
    if request.sample_seed is not None:
        underflow, wanted = _underflow(optimizer, gradients, scale, device, request)
    found_while_dividing = None
    if unscale is Unscale.IN_PLACE:
        refuse_fp16(gradients)
        found_while_dividing = unscale_and_check_(gradients, inverse, device)
    takes_amax = request.amax or sharded or request.agree
    takes_norm = request.norm or request.sample_seed is not None or not takes_amax
    norm, amax = norm_and_amax(gradients, device, norm=takes_norm, amax=takes_amax)
    if sharded and norm is not None:
        norm = _part_of_norm(optimizer, norm, device)
    if unscale is Unscale.FUSED:
        norm = None if norm is None else norm * inverse
        amax = amax if norm is not None or amax is None else amax * inverse
    bounded = collect(optimizer, request.not_sampled) if request.amax and request.not_sampled else []
    bounded_amax = total_amax(bounded, device) if bounded else None
    if bounded_amax is not None and unscale is Unscale.FUSED:
        bounded_amax = bounded_amax * inverse
    # Looked for in the unscaled figures: dividing by a scale below 1 can overflow as well. In the norm where there is one, because
    # a clip by one that is inf would leave nothing.
    found_inf = not_finite(cast(Tensor, amax if norm is None or sharded else norm))
    if found_while_dividing is not None:
        found_inf = torch.maximum(found_inf, found_while_dividing)
    if request.left_out:
        says = LEFT_OUT + dist.get_rank()
        found_inf, amax, loss_flags = (torch.full_like(found_inf, x) for x in (1.0, -1.0, says))
    if (sharded or request.agree) and is_distributed():
        bad = None if loss_flags is None else loss_flags.nan_to_num(nan=1.0).amax()
        sizes = () if underflow is None else underflow.unbind()
        worst, bad, amax, bounded_amax, wanted, *sizes_of_all, whole = _agreed(
            found_inf, bad, amax, bounded_amax, wanted, *sizes, part_of_norm=norm if sharded else None
        )
        norm = whole if sharded else norm
        found_inf = cast(Tensor, worst)
        underflow = torch.stack(cast(list[Tensor], sizes_of_all)) if sizes else None
        loss_flags = None if bad is None else torch.where(bad == 1, torch.nan, bad)
    return GradientStep(
        backward=backward,
        scale=scale,
        device=device,
        gradients=gradients,
        unscale=unscale,
        found_inf=found_inf,
        losses=losses,
        loss_flags=loss_flags,
        norm=norm,
        amax=amax,
        bounded_amax=bounded_amax,
        underflow=underflow,
        wanted_scale=wanted,
        found_while_dividing=found_while_dividing,
        inferred=norm is not None and not sharded,
        amax_is_scaled=unscale is Unscale.FUSED and norm is not None,
        agrees=sharded or request.agree,
        sharded=sharded,
        has_gradients=bool(gradients),
    )


def not_finite(figure: Tensor) -> Tensor:
    """1 where `figure`, float32, is not finite, else 0. No GPU-CPU sync."""
    return (figure - figure).nan_to_num_(nan=1.0)


def _underflow(
    optimizer: torch.optim.Optimizer,
    gradients: list[Tensor],
    scale: Tensor,
    device: torch.device,
    request: StatisticsRequest,
) -> tuple[Tensor | None, Tensor | None]:
    """What scaled gradients show of their smallest elements, and the scale that they ask for; None where there is none to sample."""
    bounded = collect(optimizer, request.not_sampled) if request.not_sampled else gradients
    if not bounded:
        return None, None
    found = sample_underflow(bounded, FP16_FORMAT, cast(int, request.sample_seed))
    return to_device(found.counts, device), to_device(found.cure, device) * scale


def _is_left_out(host: Mapping[str, float]) -> bool:
    """Whether a rank takes no such step."""
    return host.get("loss_flags", 0.0) >= LEFT_OUT


def observe(records: Sequence[GradientStep]) -> Observation:
    """What the records of one update, at least one, showed together: the worst of them. On the CPU, for the host knows it.

    One GPU-CPU sync for each that is not decided, because its optimizer has not stepped.
    """
    outcomes = [record.outcome or record.to_host(0) for record in records]

    def largest(name: str, rather: str = "") -> float:
        known = [record.host.get(rather, record.host.get(name, 0.0)) for record in records]
        return max(known, key=lambda value: math.inf if math.isnan(value) else value)

    bad_losses = float(max(outcome.non_finite_losses for outcome in outcomes))
    figures = [largest("found_inf"), bad_losses, largest("amax", rather="bounded_amax"), largest("wanted_scale")]
    found_inf, loss_non_finite, amax, wanted = torch.tensor(figures, dtype=torch.float32, device="cpu").unbind()
    is_sampled = any("wanted_scale" in record.host for record in records)
    known_clean = all(record.known_clean for record in records)
    return Observation(found_inf, loss_non_finite, amax, wanted if is_sampled else None, known_clean)


def refuse_fp16(gradients: list[Tensor]) -> None:
    """Raises `ScalerError` where FP16 gradients would be divided in place, which rounds away what scaling has saved."""
    if any(gradient.dtype == torch.float16 for gradient in gradients):
        raise ScalerError(
            "the optimizer holds FP16 parameters, whose gradients cannot be unscaled in place: keep trainable "
            "parameters in FP32 (model.float(), or dtype=torch.float32 in from_pretrained), which autocast casts, or "
            "keep FP32 master weights of them with MixedPrecisionConfig(half_parameters='master_weights')."
        )


def _agreed(*values: Tensor | None, part_of_norm: Tensor | None = None) -> list[Tensor | None]:
    """The largest over all ranks of each, and last the norm; None stays, which all ranks have in the same places."""
    if not is_distributed():
        return [*values, part_of_norm]
    known = (value for value in values if value is not None)
    agreed = iter(all_reduce_max(*known, part_of_norm=part_of_norm))
    return [None if value is None else next(agreed) for value in (*values, part_of_norm)]


def _part_of_norm(optimizer: torch.optim.Optimizer, norm: Tensor, device: torch.device) -> Tensor | None:
    """This rank's part of the norm of sharded gradients, of which several may hold copies; None where sums are still to be made."""
    gradients = (cast(Any, g) for p in held_by(optimizer) if (g := p.grad) is not None)
    kinds = {(id(getattr(g, "placements", None)), id(getattr(g, "device_mesh", None))): g for g in gradients}
    held = {copies_of(gradient) for gradient in kinds.values()}
    if 0 in held or len(held) <= 1:
        return None if 0 in held else norm * math.sqrt(1 / next(iter(held), 1.0))
    every = [g for p in held_by(optimizer) if (g := p.grad) is not None]
    parts = [(n, [local_part(g) for g in every if copies_of(g) == n]) for n in held]
    squares = [cast(Tensor, norm_and_amax(each, device, amax=False)[0]).square() / n for n, each in parts]
    return torch.stack(squares).sum().sqrt_()


_KERNEL_DTYPES = (torch.float32, torch.float64, torch.float16)


@torch.no_grad()
def unscale_and_check_(gradients: Sequence[Tensor], inverse_scale: Tensor, figures_on: torch.device) -> Tensor:
    """Multiplies `gradients` in place by `inverse_scale`; says whether any element was not finite before.

    Returns:
        Tensor of shape [], float32, on `figures_on`: 0 where all were finite. No GPU-CPU sync.

    The kernel is the stock scaler's own, which has no public name; `tests/contract` fails by name if it goes. It
    does not know BF16 on every device, for which two public operators do the same.
    """
    verdicts = []
    for (device, dtype), group in by_device_and_dtype(gradients).items():
        factor = to_device(inverse_scale, device)
        if dtype in _KERNEL_DTYPES:
            found_here = torch.zeros((), dtype=torch.float32, device=device)
            torch._amp_foreach_non_finite_check_and_unscale_(group, found_here, factor)
        else:
            torch._foreach_mul_(group, factor)
            found_here = not_finite(total_amax(group, device))
        verdicts.append(to_device(found_here, figures_on))
    return verdicts[0] if len(verdicts) == 1 else torch.stack([torch.zeros((), device=figures_on), *verdicts]).amax()


@torch.no_grad()
def multiply_(gradients: Sequence[Tensor], factor: Tensor) -> None:
    """Multiplies `gradients` in place by `factor`, shape []. No GPU-CPU sync."""
    for (device, _), group in by_device_and_dtype(gradients).items():
        torch._foreach_mul_(group, to_device(factor, device))


@dataclass
class SeenLosses:
    """The losses behind the gradients of one step, or of those of several optimizers whose gradients they made together.

    Attributes:
        number: how many there were.
        reported: how many of them a step has reported.
        flags: of each NaN where it held a non-finite value, else 0; shape [], float32, on the loss's device.
        began: whether backward has begun, as far as it is looked for, where ranks agree.
        ended: whether the next backward begins anew.
        newest: the tensor that the newest goes into backward as; None where nobody holds it any more.
    """

    number: int = 0
    reported: int = 0
    flags: list[Tensor] = field(default_factory=list)
    began: bool = False
    ended: bool = False
    newest: Callable[[], Tensor | None] = lambda: None

    def note(self, loss: Tensor) -> None:
        """Counts `loss`. No GPU-CPU sync."""
        known = loss.detach()
        flags = known - known  # NaN where it is not finite, 0 elsewhere
        self.number += 1
        self.flags.append((flags.sum() if flags.dim() else flags).float())

    def begin(self, gradient: Tensor) -> None:
        """A hook of what goes into backward."""
        self.began = True

    def flags_on(self, device: torch.device) -> Tensor | None:
        """All of them, shape [] or [n], on `device`; None where there are none. No GPU-CPU sync."""
        flags = [flag if flag.device == device else to_device(flag, device) for flag in self.flags]
        return torch.stack(flags) if len(flags) > 1 else next(iter(flags), None)


@dataclass
class _Known:
    optimizer: Callable[[], torch.optim.Optimizer | None]
    record: GradientStep | None = None
    applied: list[tuple[TensorWeakRef, int]] = field(default_factory=list)
    """The gradients of its last step, and their versions then; none where a loop has one optimizer."""
    closed_after: int | None = None
    """Backward passes begun until its last step; None before the first."""


class PendingSteps:
    """The records of one scaler's optimizers, each from its check until the update after its step, and the losses behind them.

    Gradients do not say which backward they are from. So that each is divided by the scale of its own all the same, those
    that wait for their optimizer's step while the scale changes are brought to the new one before the next backward: all
    that are scaled have one scale. A loop with one optimizer pays nothing for it. Keeps neither optimizers nor applied
    gradients alive. No GPU-CPU sync.

    Attributes:
        backwards: backward passes begun.
        scale: that of the newest backward, shape [], float32; None before the first. On the CPU, or where the loss was.
        losses: seen since the last update that ended a step.
    """

    def __init__(self) -> None:
        self.backwards = 0
        self.scale: Tensor | None = None
        self.losses = SeenLosses()
        self._known: dict[int, _Known] = {}

    def __bool__(self) -> bool:
        return any(known.record is not None for known in self._known.values())

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Counts `optimizer` among those whose gradients can wait."""
        self._of(optimizer)

    def begin_backward(self, next_scale: Tensor | None, discard_forwards: Callable[[], bool]) -> None:
        """Keeps what waits for its step apart from what the next backward, whose scale is given, makes."""
        if self.losses.ended or (self._are_discarded() and discard_forwards()):
            self.losses = SeenLosses()
        for known, optimizer in self._alive():
            record = known.record
            if record is None:
                continue
            if record.state is StepState.LEFT_OVER and not _is_untouched(record, optimizer):
                known.record = None
            elif record.versions is None:  # as the caller has left them
                record.gradients = collect(optimizer)
                record.versions = _versions(record.gradients)
                if record.state is StepState.CHECKED:
                    record.cleared = total_amax(record.gradients, record.device) == 0
                    known.record = record if record.gradients else None
        self.backwards += 1
        former, several = self.scale, len(self._known) > 1
        if several and former is not None and next_scale is not None and next_scale is not former:
            factor = next_scale * reciprocal(former)  # exact, between powers of two
            for known, optimizer in self._alive():
                if known.record is None:
                    multiply_(_added_to(collect(optimizer), known.applied), factor)

    def _are_discarded(self) -> bool:
        """Whether gradients of the losses so far were set to None without a step. No GPU-CPU sync."""
        if not self.losses.number or self.losses.newest() is not None:  # its backward may be still to come
            return False
        known = list(self._alive())
        stepped = (each.record is not None and each.record.state is StepState.STEPPED for each, _ in known)
        held = (p.grad is not None for _, it in known for p in held_by(it))
        return bool(known) and not any(held) and not any(stepped)

    def check(
        self,
        optimizer: torch.optim.Optimizer,
        scale: Tensor,
        device: torch.device,
        unscale: Unscale,
        request: StatisticsRequest,
    ) -> GradientStep:
        """Opens a record of `optimizer`'s gradients, which are new.

        Losses and scale are those of the newest backward passes, which may have been other optimizers' too. Where none has
        begun since its last step, its caller multiplies by `get_scale()`: there are no losses, and `scale` is the present one.
        """
        by_hand = self._of(optimizer).closed_after == self.backwards
        losses = SeenLosses() if by_hand else self.losses
        unreported, losses.reported = losses.number - losses.reported, losses.number
        record = check(
            optimizer,
            backward=self.backwards,
            scale=scale if by_hand or self.scale is None else self.scale,
            device=device,
            unscale=unscale,
            losses=unreported,
            loss_flags=losses.flags_on(device),
            request=request,
        )
        self._of(optimizer).record = record
        return record

    def current(self, optimizer: torch.optim.Optimizer) -> GradientStep | None:
        """What was found of these very gradients; None where they are new since.

        Raises:
            ScalerError: something was added to gradients that had been unscaled or clipped.
        """
        known = self._of(optimizer)
        record = known.record
        if record is None or record.backward == self.backwards or record.state is StepState.STEPPED:
            return record
        if _is_untouched(record, optimizer):  # the backward passes since were another optimizer's
            return record
        cleared = record.cleared is not None and to_host({"cleared": record.cleared})["cleared"]
        if (
            cleared or record.state is StepState.LEFT_OVER
        ):  # from before an update: the next backward made new gradients
            known.record = None
            return None
        raise ScalerError(
            "backward added scaled gradients to ones that unscale_() or a clip had already divided by the scale. Unscale or clip "
            "only after the last backward of the accumulation window, and before that of another optimizer; after a step that you "
            "leave out, call zero_grad()."
        )

    def added_to(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether a backward has begun since `optimizer`'s gradients were checked, and it has not stepped."""
        record = self._of(optimizer).record
        return record is not None and record.state is StepState.CHECKED and record.backward != self.backwards

    def close(self, optimizer: torch.optim.Optimizer, record: GradientStep) -> None:
        """`record`'s step is over, applied or not: until something is added to its gradients, they do not wait."""
        several = len(self._known) > 1
        known = self._of(optimizer)
        known.applied = [(TensorWeakRef(g), g._version) for g in record.gradients] if several else []
        known.closed_after = self.backwards
        record.gradients = []

    def unobserved(self) -> dict[int, GradientStep]:
        """The records that no update has seen, by the optimizer's `id`."""
        return {
            key: known.record
            for key, known in self._known.items()
            if known.record is not None and known.record.state is not StepState.LEFT_OVER
        }

    def leave_over(self) -> None:
        """Gradients that wait for their step are from before a state that was loaded."""
        for record in self.unobserved().values():
            if record.state is StepState.CHECKED:
                record.state = StepState.LEFT_OVER

    def end_update(self) -> None:
        """All records have been seen, and those whose step is over are forgotten."""
        self.losses.ended = True
        for known in self._known.values():
            if known.record is not None and known.record.state is StepState.STEPPED:
                known.record = None
            self.losses.ended &= known.record is None
        self.leave_over()

    def is_waiting(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether a backward has begun since `optimizer`'s last step, and none of its steps is running."""
        known = self._of(optimizer)
        is_stepping = known.record is not None and known.record.state is StepState.STEPPED
        return not is_stepping and self.backwards > (known.closed_after or 0)

    def forget(self, key: int) -> None:
        """Lets the optimizer with this `id` be checked anew."""
        if key in self._known:
            self._known[key].record = None

    def abandon(self) -> None:
        """Forgets every record and loss: the gradients will not be applied."""
        self.losses = SeenLosses()
        for known in self._known.values():
            known.record = None

    def _of(self, optimizer: torch.optim.Optimizer) -> _Known:
        """By identity: what stands in for an optimizer may be neither hashable nor weakly referable."""
        key, everyone = id(optimizer), self._known
        if key not in everyone:
            try:
                everyone[key] = _Known(weakref.ref(optimizer, lambda _: everyone.pop(key, None)))
            except TypeError:
                everyone[key] = _Known(lambda: optimizer)
        return everyone[key]

    def _alive(self) -> Iterator[tuple[_Known, torch.optim.Optimizer]]:
        for known in list(self._known.values()):
            if (optimizer := known.optimizer()) is not None:
                yield known, optimizer


def _is_untouched(record: GradientStep, optimizer: torch.optim.Optimizer) -> bool:
    """Whether these are still the gradients of `optimizer`, and nothing was added to them since the next backward began."""
    now = collect(optimizer)
    same = {g.data_ptr() for g in now} == {g.data_ptr() for g in record.gradients}
    return same and record.versions in (None, _versions(now))


def _versions(gradients: Iterable[Tensor]) -> int:
    return sum(gradient._version for gradient in gradients)


def _added_to(gradients: Iterable[Tensor], applied: Iterable[tuple[TensorWeakRef, int]]) -> list[Tensor]:
    """Those of `gradients` that are not among `applied`, or have been written to since."""
    versions = {id(g): version for ref, version in applied if (g := ref()) is not None}
    return [g for g in gradients if versions.get(id(g)) != g._version]
