"""What became of one optimizer step, as known on the host."""

from __future__ import annotations

import enum
import functools
import math
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from hf_amp.errors import ScalerError
from hf_amp.precision import FP16_FORMAT
from hf_amp.statistics import (
    PendingTransfer,
    all_reduce_max,
    by_device_and_dtype,
    collect,
    count_non_finite,
    exact_norm,
    is_distributed,
    norm_and_amax,
    sample_underflow,
    to_device,
    to_host,
    total_amax,
)


@dataclass(frozen=True)
class StepOutcome:
    """One optimizer step.

    Attributes:
        attempt: number of the step among all that the scaler decided, from 1.
        applied: whether the optimizer moved anything; where not, parameters and optimizer state are as before.
        scale: the scale that the gradients' backward used.
        loss_finite: whether every loss behind the gradients was finite; None where the scaler saw no loss.
        backward: number of the backward that made the gradients; the same for optimizers that step from one.
        losses: how many losses (micro-batches) the scaler saw behind the gradients, each told of in one step alone, where one
            backward makes gradients for several optimizers.
        non_finite_losses: how many of them were not finite; with several processes, on the worst of them.
        zero_gradients: whether there are gradients and every element of them is exactly zero: nothing is learned.
        has_gradients: whether any parameter had a gradient.
        grad_norm: 2-norm of the unscaled gradients before clipping; None where unknown or not finite.
        grad_amax: largest magnitude of the same; None likewise.
        underflow_fraction: share of scaled gradient elements that are zero or subnormal; None where not sampled.
        lost_update_fraction: share of low-precision parameter elements that the newest sampled step, an earlier one, did
            not change; None where none was sampled since the last outcome.
        inf_elements: infinite gradient elements of a skipped step, as they are when it is decided: a plain clip before
            has made all of them NaN, a folded one has not. None where not counted.
        nan_elements: NaN gradient elements, likewise.
        carried: what the scaler's `step_hooks` asked for, by the names of `snapshot.read`.
    """

    attempt: int
    applied: bool
    scale: float
    backward: int = 0
    loss_finite: bool | None = None
    losses: int = 0
    non_finite_losses: int = 0
    zero_gradients: bool = False
    has_gradients: bool = True
    grad_norm: float | None = None
    grad_amax: float | None = None
    underflow_fraction: float | None = None
    lost_update_fraction: float | None = None
    inf_elements: int | None = None
    nan_elements: int | None = None
    extras: Mapping[str, float] = field(default_factory=dict)

    def non_finite_fraction(self, elements: int) -> float:
        """Share of the step's gradient `elements` that are not finite; 1 where they were not counted."""
        if self.inf_elements is None or self.nan_elements is None or not elements:
            return 1.0
        return (self.inf_elements + self.nan_elements) / elements


_KERNEL_DTYPES = (torch.float32, torch.float64, torch.float16)


def reciprocal(scale: Tensor) -> Tensor:
    """1 / scale, shape [], float32. Rounded once from FP64, as `torch.amp.GradScaler.unscale_` does; MPS has none."""
    if scale.device.type == "mps":
        return scale.reciprocal()
    return scale.double().reciprocal().float()


@torch.no_grad()
def unscale_and_check_(gradients: Sequence[Tensor], inverse_scale: Tensor) -> Tensor:
    """Multiplies `gradients` in place by `inverse_scale`; says whether any element was not finite before.

    Returns:
        Tensor of shape [], float32, on the device of `inverse_scale`: 0 where all were finite. No host read.

    The kernel is the stock scaler's own, which has no public name; `tests/contract` fails by name if it goes. It
    does not know BF16 on every device, for which two public operators do the same.
    """
    found = torch.zeros((), dtype=torch.float32, device=inverse_scale.device)
    for (device, dtype), group in by_device_and_dtype(gradients).items():
        factor = to_device(inverse_scale, device)
        if dtype in _KERNEL_DTYPES:
            found_here = torch.zeros((), dtype=torch.float32, device=device)
            torch._amp_foreach_non_finite_check_and_unscale_(group, found_here, factor)
        else:
            torch._foreach_mul_(group, factor)
            found_here = (~total_amax(group, device).isfinite()).float()
        found = torch.maximum(found, to_device(found_here, found.device))
    return found


@torch.no_grad()
def multiply_(gradients: Sequence[Tensor], factor: Tensor) -> None:
    """Multiplies `gradients` in place by `factor`, shape []. No host read."""
    for (device, _), group in by_device_and_dtype(gradients).items():
        torch._foreach_mul_(group, to_device(factor, device))


EXTRA = "carried "
"""Stands before the names of what others want read along."""


class Unscale(enum.Enum):
    """What becomes of the gradients while they are examined."""

    IN_PLACE = "divide"
    """Unscaled in place, so that the caller can look at them or clip them."""
    FUSED = "fold"
    """Left scaled: whatever applies them divides by the scale, and clips, on the way."""
    NONE = "check"
    """Never scaled (BF16, FP32): only looked at."""


@dataclass
class GradientStep:
    """What is known of one optimizer's gradients, from their examination until the update after their step.

    All tensors have shape [] and are float32, on the scale's device.
    """

    backward: int
    """Number of the backward that made the gradients."""
    scale: Tensor
    """The scale which that backward used."""
    gradients: list[Tensor]
    unscale: Unscale
    found_inf: Tensor
    """Above 0 where an element is not finite."""
    losses: int
    """Losses (micro-batches) behind the gradients that the scaler saw, and that no other step was told of."""
    loss_non_finite: Tensor | None
    """How many of them were not finite, on the worst rank; None where the scaler saw none."""
    magnitude: Tensor
    """What `found_inf` was found in: the norm or the amax of the unscaled gradients."""
    norm: Tensor | None = None
    """2-norm of the unscaled gradients, before clipping."""
    amax: Tensor | None = None
    """Largest magnitude of the unscaled gradients."""
    underflow_fraction: Tensor | None = None
    wanted_scale: Tensor | None = None
    """The scale at which hardly any element would underflow; 0 where none is seen."""
    clip_coefficient: Tensor | None = None
    """What a folded clip multiplies the unscaled gradients by."""
    max_norm: float = math.inf
    """What a folded clip limits the norm to."""
    lost_update_fraction: Tensor | None = None
    """Share of low-precision elements that the newest sampled step before this one did not change."""
    inferred: bool = False
    """Whether `found_inf` was inferred from a norm, whose FP32 sum of squares can overflow by itself."""
    found_while_dividing: Tensor | None = None
    """What the unscaling kernel itself found, which stands whatever the caller makes of the gradients since."""
    agrees: bool = False
    """Whether the verdict is that of all ranks."""
    has_gradients: bool = True
    """Whether any parameter had a gradient."""
    stepped: bool = False
    """Whether the optimizer's step has been decided."""
    known_clean: bool = False
    """Whether the host knows the gradients to be finite, and some to be other than 0."""
    observed: bool = False
    """Whether the policy has seen it."""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """What others want read along: tensors of shape [] or [n]."""
    marked: int | None = None
    """Writes to the gradients, by autograd's own counter, until the first backward after them; None before it."""

    def figures(self) -> dict[str, Tensor]:
        """What the host wants to know, by name."""
        named = {
            "found_inf": self.found_inf,
            "scale": self.scale,
            "loss_non_finite": self.loss_non_finite,
            "norm": self.norm,
            "amax": self.amax,
            "underflow_fraction": self.underflow_fraction,
            "lost_update_fraction": self.lost_update_fraction,
            "magnitude": self.magnitude if self.norm is None and self.amax is None else None,
        }
        extras = {EXTRA + name: value for name, value in self.extras.items()}
        return {**{name: value for name, value in named.items() if value is not None}, **extras}

    def mark(self, optimizer: torch.optim.Optimizer) -> None:
        """Remembers the gradients as the caller has left them, before another backward begins. Later calls do nothing."""
        if self.marked is None:
            self.gradients = collect(optimizer)
            self.marked = sum(gradient._version for gradient in self.gradients)

    def is_untouched(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether these are still the gradients of `optimizer`, and nothing was added to them since `mark`."""
        now = collect(optimizer)
        same = [g.data_ptr() for g in now] == [g.data_ptr() for g in self.gradients]
        return same and self.marked in (None, sum(gradient._version for gradient in now))

    def clip(self, max_norm: float, trusting: bool) -> Tensor:
        """Folds a clip into what will apply the gradients. Returns their norm before it, unscaled; no host read.

        Source of the coefficient: `torch.nn.utils.clip_grads_with_norm_`.

        Args:
            trusting: take the norm as it is, because the host will mend one that is inf by overflow of its squares.
                Otherwise such a norm is replaced, for the coefficient, by its upper bound amax * sqrt(elements).
        """
        norm = before = cast(Tensor, self.norm)
        if not trusting:
            elements = sum(gradient.numel() for gradient in self.gradients)
            norm = torch.where(norm < math.inf, norm, cast(Tensor, self.amax) * math.sqrt(elements))
        if self.clip_coefficient is not None:
            before = norm * self.clip_coefficient
        self.max_norm = min(self.max_norm, max_norm)
        if math.isfinite(self.max_norm):
            self.clip_coefficient = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
        return before

    def verify(self) -> None:
        """Takes a `found_inf` that was inferred from the norm again from the amax, which is exact."""
        self.amax = total_amax(self.gradients, self.scale.device)
        if self.unscale is Unscale.FUSED:
            self.amax = self.amax * reciprocal(self.scale)
        self.found_inf = (~(self.amax < math.inf)).float()
        if self.found_while_dividing is not None:
            self.found_inf = torch.maximum(self.found_inf, self.found_while_dividing)
        self.inferred = False

    def recompute_norm(self) -> None:
        """Takes a norm whose FP32 sum of squares was inf again, within its range, and the clip that it led to. Slow, rare."""
        if self.norm is None:
            return
        exact = exact_norm(self.gradients, self.scale.device)
        if self.unscale is Unscale.FUSED:
            exact = exact * reciprocal(self.scale)
        self.norm.copy_(exact)  # in place: the caller of clip holds it
        if self.clip_coefficient is not None:
            self.clip_coefficient = None
            self.clip(self.max_norm, trusting=True)

    def recheck(self, optimizer: torch.optim.Optimizer) -> None:
        """Looks at the gradients again, for what has happened to them since; one more read of them."""
        self.gradients = collect(optimizer)
        again = total_amax(self.gradients, self.scale.device)
        found = (~again.isfinite()).float()
        if self.agrees:
            found = cast(Tensor, _agreed(found)[0])
        self.found_inf = torch.maximum(self.found_inf, found)


@dataclass(frozen=True)
class StatisticsRequest:
    """What `examine` is to find out beyond whether all is finite.

    Attributes:
        norm: the 2-norm.
        amax: the largest magnitude, which makes `found_inf` exact; otherwise `GradientStep.verify` must follow up.
        sample_seed: the underflow fraction, from a sample with this seed; None for not.
        agree: exchange what is local to a rank with the other ranks.
        not_sampled: `id` of the parameters that the format does not bound, because their modules run in FP32.
    """

    norm: bool
    amax: bool
    sample_seed: int | None
    agree: bool
    not_sampled: Collection[int] = ()


def check_gradients(
    optimizer: torch.optim.Optimizer,
    *,
    backward: int,
    scale: Tensor,
    unscale: Unscale,
    losses: int,
    loss_non_finite: Tensor | None,
    request: StatisticsRequest,
) -> GradientStep:
    """Finds out what `optimizer`'s gradients are; treats them on the way. No host read.

    Sharded gradients (DTensors) are always divided in place, and their verdict is that of all shards.

    Raises:
        ScalerError: they are to be divided and one is FP16: that would round away what scaling has saved.
    """
    sharded = _is_sharded(optimizer)
    if sharded and unscale is Unscale.FUSED:
        unscale = Unscale.IN_PLACE
    gradients = collect(optimizer)
    underflow = wanted = None
    bounded = collect(optimizer, request.not_sampled) if request.not_sampled else gradients
    if request.sample_seed is not None and bounded:
        found = sample_underflow(bounded, FP16_FORMAT, request.sample_seed)
        underflow = to_device(found.fraction, scale.device)
        wanted = to_device(found.cure, scale.device) * scale
    inverse = scale if unscale is Unscale.NONE else reciprocal(scale)
    found_while_dividing = None
    if unscale is Unscale.IN_PLACE:
        refuse_fp16(gradients)
        found_while_dividing = unscale_and_check_(gradients, inverse)
    takes_amax = request.amax or sharded or request.agree
    takes_norm = (request.norm and not sharded) or not takes_amax
    norm, amax = norm_and_amax(gradients, scale.device, norm=takes_norm, amax=takes_amax)
    if unscale is Unscale.FUSED:
        amax = None if amax is None else amax * inverse
        norm = None if norm is None else norm * inverse
    # Looked for in the unscaled figures: dividing by a scale below 1 can overflow as well.
    magnitude = cast(Tensor, norm if amax is None else amax)
    found_inf = (~(magnitude < math.inf)).float()
    if found_while_dividing is not None:
        found_inf = torch.maximum(found_inf, found_while_dividing)
    if sharded or request.agree:
        agreed = _agreed(found_inf, loss_non_finite, amax, underflow, wanted)
        found_inf = cast(Tensor, agreed[0])
        loss_non_finite, amax, underflow, wanted = agreed[1:]
    return GradientStep(
        backward=backward,
        scale=scale,
        gradients=gradients,
        unscale=unscale,
        found_inf=found_inf,
        losses=losses,
        loss_non_finite=loss_non_finite,
        magnitude=magnitude,
        norm=norm if request.norm else None,
        amax=amax,
        underflow_fraction=underflow,
        wanted_scale=wanted,
        inferred=not takes_amax,
        found_while_dividing=found_while_dividing,
        agrees=sharded or request.agree,
        has_gradients=bool(gradients),
    )


def _is_sharded(optimizer: torch.optim.Optimizer) -> bool:
    kinds = {type(parameter.grad) for group in optimizer.param_groups for parameter in group["params"]}
    return any(hasattr(kind, "to_local") for kind in kinds)


def refuse_fp16(gradients: list[Tensor]) -> None:
    """Raises `ScalerError` where FP16 gradients would be divided in place, which rounds away what scaling has saved."""
    if any(gradient.dtype == torch.float16 for gradient in gradients):
        raise ScalerError(
            "the optimizer holds FP16 parameters, whose gradients cannot be unscaled in place: keep trainable "
            "parameters in FP32 (model.float(), or dtype=torch.float32 in from_pretrained), which autocast casts, or "
            "keep FP32 master weights of them with MixedPrecisionConfig(half_parameters='master_weights')."
        )


def _agreed(*values: Tensor | None) -> list[Tensor | None]:
    """The largest over all ranks of each; None stays, which all ranks have in the same places."""
    known = [value for value in values if value is not None]
    if not is_distributed():
        return list(values)
    agreed = iter(all_reduce_max(*known))
    return [None if value is None else next(agreed) for value in values]


@dataclass
class _Known:
    optimizer: Callable[[], torch.optim.Optimizer | None]
    record: GradientStep | None = None
    applied: list[tuple[TensorWeakRef, int]] = field(default_factory=list)
    """The gradients of its last step, and their versions then; none where a loop has one optimizer."""
    closed_after: int | None = None
    """Backward passes begun until its last step; None before the first."""


class PendingSteps:
    """The boundaries of one scaler's optimizers, each from its examination until the update after its step.

    Gradients do not say which backward they are from. So that each is divided by the scale of its own all the same, those
    that wait for their optimizer's step while the scale changes are brought to the new one before the next backward: all
    that are scaled have one scale. A loop with one optimizer pays nothing for it. Keeps neither optimizers nor applied
    gradients alive. No host read.

    Attributes:
        backwards: backward passes begun.
    """

    def __init__(self) -> None:
        self.backwards = 0
        self._known: dict[int, _Known] = {}

    def __bool__(self) -> bool:
        return any(known.record is not None for known in self._known.values())

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Counts `optimizer` among those whose gradients can wait."""
        self._of(optimizer)

    def open(self, optimizer: torch.optim.Optimizer, record: GradientStep) -> None:
        """`optimizer`'s gradients have been examined."""
        self._of(optimizer).record = record

    def begin_backward(self, former: Tensor | None, scale: Tensor | None) -> None:
        """Keeps what waits for its step apart from what the next backward makes.

        Args:
            former: the scale of the last backward, shape [], float32; None before the first.
            scale: that of the next; None before the first.
        """
        for known, optimizer in self._alive():
            record = known.record
            if record is None:
                continue
            if record.observed and not record.stepped and not record.is_untouched(optimizer):
                known.record = None
            else:
                record.mark(optimizer)
        self.backwards += 1
        several = len(self._known) > 1
        if several and former is not None and scale is not None and scale is not former:
            self._rescale(scale * reciprocal(former))

    def current(self, optimizer: torch.optim.Optimizer) -> GradientStep | None:
        """What was examined of these very gradients; None where they are new since.

        Raises:
            ScalerError: something was added to gradients that had been unscaled or clipped.
        """
        known = self._of(optimizer)
        record = known.record
        if record is None or record.backward == self.backwards or record.stepped:
            return record
        if record.is_untouched(optimizer):  # the backward passes since were another optimizer's
            return record
        if record.observed:  # left over from before an update: the next backward made new gradients
            known.record = None
            return None
        raise ScalerError(
            "more gradients were accumulated onto ones that unscale_() or a clip had treated already: unscale or clip "
            "only after the last backward of the accumulation window, and before that of another optimizer. A step that is "
            "left out needs its update() all the same."
        )

    def close(self, optimizer: torch.optim.Optimizer, record: GradientStep) -> None:
        """`record`'s step is over, applied or not: until something is added to its gradients, they do not wait."""
        several = len(self._known) > 1
        known = self._of(optimizer)
        known.applied = [(TensorWeakRef(g), g._version) for g in record.gradients] if several else []
        known.closed_after = self.backwards
        record.gradients = []

    def is_scaled_by_hand(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether no backward has begun here since `optimizer`'s last step: its caller multiplies by `get_scale()`."""
        return self._of(optimizer).closed_after == self.backwards

    def is_waiting(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether a backward has begun since `optimizer`'s last step, and none of its steps is running."""
        known = self._of(optimizer)
        is_stepping = known.record is not None and known.record.stepped
        return not is_stepping and self.backwards > (known.closed_after or 0)

    def unobserved(self) -> dict[int, GradientStep]:
        """The boundaries that no update has seen, by the optimizer's `id`."""
        records = {key: known.record for key, known in self._known.items()}
        return {key: found for key, found in records.items() if found is not None and not found.observed}

    def end_update(self) -> None:
        """All boundaries have been seen, and those whose step is over are forgotten."""
        for known in self._known.values():
            if known.record is not None:
                known.record.observed = True
                if known.record.stepped:
                    known.record = None

    def forget(self, key: int) -> None:
        """Lets the optimizer with this `id` be examined anew."""
        if key in self._known:
            self._known[key].record = None

    def abandon(self) -> None:
        """Forgets every boundary: its gradients will not be applied."""
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

    def _rescale(self, factor: Tensor) -> None:
        """Multiplies all gradients that wait and are scaled: exactly, between powers of two."""
        for known, optimizer in self._alive():
            if known.record is None:
                multiply_(_added_to(collect(optimizer), known.applied), factor)


def _added_to(gradients: Iterable[Tensor], applied: Iterable[tuple[TensorWeakRef, int]]) -> list[Tensor]:
    """Those of `gradients` that are not among `applied`, or have been written to since."""
    versions = {id(g): version for ref, version in applied if (g := ref()) is not None}
    return [g for g in gradients if versions.get(id(g)) != g._version]


def outcome_now(attempt: int, record: GradientStep) -> StepOutcome:
    """What is to become of the step. One host read; more where it overflowed, to look closer."""
    host = to_host(record.figures())
    if host["found_inf"] and record.inferred:
        record.verify()
        host = to_host(record.figures())
    if host["found_inf"]:
        return _outcome(attempt, record, host, count_non_finite(record.gradients))
    if not math.isfinite(host.get("norm", 0.0)):
        record.recompute_norm()
        host = to_host(record.figures())
    outcome = _outcome(attempt, record, host, None)
    record.known_clean = record.has_gradients and not outcome.zero_gradients
    return outcome


class PendingVerdict:
    """The outcome of a step whose optimizer decides on the device, on its way to the host."""

    def __init__(self, attempt: int, record: GradientStep, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._attempt = attempt
        self._boundary = record
        self._read = PendingTransfer(record.figures())

    def age(self, attempts: int) -> int:
        """Steps decided since."""
        return attempts - self._attempt

    def ready(self) -> bool:
        """Whether `outcome` would not wait for the device."""
        return self._read.ready()

    def outcome(self) -> StepOutcome:
        """The outcome; waits for the device where `ready` is False. What was not finite has not been counted."""
        return _outcome(self._attempt, self._boundary, self._read.result(), None)


def _outcome(
    attempt: int, record: GradientStep, host: Mapping[str, float], non_finite: tuple[int, int] | None
) -> StepOutcome:
    applied = host["found_inf"] == 0
    magnitude = min(host[name] for name in ("norm", "amax", "magnitude") if name in host)

    def finite(name: str) -> float | None:
        value = host.get(name, math.nan)
        return value if math.isfinite(value) else None

    return StepOutcome(
        attempt=attempt,
        applied=applied,
        scale=host["scale"],
        backward=record.backward,
        loss_finite=host["loss_non_finite"] == 0 if "loss_non_finite" in host else None,
        losses=record.losses,
        non_finite_losses=min(int(host.get("loss_non_finite", 0)), record.losses),
        zero_gradients=magnitude == 0 and record.has_gradients,
        has_gradients=record.has_gradients,
        grad_norm=finite("norm") if applied else None,
        grad_amax=finite("amax") if applied else None,
        underflow_fraction=finite("underflow_fraction"),
        lost_update_fraction=finite("lost_update_fraction"),
        inf_elements=non_finite[0] if non_finite else None,
        nan_elements=non_finite[1] if non_finite else None,
        extras={name.removeprefix(EXTRA): value for name, value in host.items() if name.startswith(EXTRA)},
    )


def map_losses(convert: Callable[[Tensor], Tensor], outputs: Any) -> Any:
    """`outputs`, a tensor or nested iterables of tensors, with every tensor converted. Lists and tuples stay such.

    Raises:
        ScalerError: there is something else in it.
    """
    if isinstance(outputs, Tensor):
        return convert(outputs)
    if isinstance(outputs, (list, tuple)):
        return type(outputs)(map_losses(convert, item) for item in outputs)
    if hasattr(outputs, "__iter__") and not isinstance(outputs, (str, bytes)):
        return map(functools.partial(map_losses, convert), outputs)
    raise ScalerError(
        f"AdvancedGradScaler.scale got {type(outputs).__name__}: pass a tensor or an iterable of tensors."
    )


def refuse_capture(loss: Tensor) -> None:
    """Raises `ScalerError` where a CUDA graph is being captured: its replays would all scale by this step's scale."""
    if loss.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ScalerError(
            "scaler.scale(loss) while a CUDA graph is captured: every replay would scale by what the scale is now, and steps "
            "divide by what it has become. Capture the model alone (torch.cuda.make_graphed_callables), before hf_amp is "
            "attached to it, and scale its loss outside of the graph."
        )


@dataclass
class SeenLosses:
    """The losses behind the gradients of one step, or of those of several optimizers whose gradients they made together.

    Attributes:
        number: how many there were.
        told: how many of them a step was told of.
        non_finite: how many held a non-finite value; shape [], float32. None before the first.
        ended: whether the next backward begins anew.
    """

    number: int = 0
    reported: int = 0
    non_finite: Tensor | None = None
    ended: bool = False

    def unreported(self) -> int:
        """How many of them no step was told of yet; they are told from now on."""
        number, self.reported = self.number - self.reported, self.number
        return number

    def note(self, loss: Tensor, device: torch.device) -> None:
        """Counts `loss`, on `device`. No host read."""
        known = loss.detach()
        flags = torch.nan_to_num(known - known, nan=1.0)  # NaN where it is not finite, 0 elsewhere
        found = to_device(flags.any() if flags.dim() else flags, device, torch.float32)
        self.number += 1
        self.non_finite = found if self.non_finite is None else self.non_finite + found
