"""One optimizer's gradients at a step boundary: examined on their device, decided on, and applied."""

from __future__ import annotations

import enum
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from hf_amp.errors import ScalerError
from hf_amp.precision import FP16_FORMAT
from hf_amp.scaling.unscale import reciprocal, unscale_and_check_
from hf_amp.statistics import agreement, samples
from hf_amp.statistics import gradients as statistics
from hf_amp.statistics.transfer import moved

CARRIED = "carried "
"""Stands before the names of what others want read along."""


class Treatment(enum.Enum):
    """What becomes of the gradients while they are examined."""

    DIVIDE = "divide"
    """Unscaled in place, so that the caller can look at them or clip them."""
    FOLD = "fold"
    """Left scaled: whatever applies them divides by the scale, and clips, on the way."""
    CHECK = "check"
    """Never scaled (BF16, FP32): only looked at."""


@dataclass
class Boundary:
    """What is known of one optimizer's gradients, from their examination until the update after their step.

    All tensors have shape [] and are float32, on the scale's device.
    """

    backward: int
    """Number of the backward that made the gradients."""
    scale: Tensor
    """The scale which that backward used."""
    gradients: list[Tensor]
    treatment: Treatment
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
    carried: dict[str, Tensor] = field(default_factory=dict)
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
        carried = {CARRIED + name: value for name, value in self.carried.items()}
        return {**{name: value for name, value in named.items() if value is not None}, **carried}

    def mark(self, optimizer: torch.optim.Optimizer) -> None:
        """Remembers the gradients as the caller has left them, before another backward begins. Later calls do nothing."""
        if self.marked is None:
            self.gradients = statistics.collect(optimizer)
            self.marked = sum(gradient._version for gradient in self.gradients)

    def is_untouched(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether these are still the gradients of `optimizer`, and nothing was added to them since `mark`."""
        now = statistics.collect(optimizer)
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
        self.amax = statistics.total_amax(self.gradients, self.scale.device)
        if self.treatment is Treatment.FOLD:
            self.amax = self.amax * reciprocal(self.scale)
        self.found_inf = (~(self.amax < math.inf)).float()
        if self.found_while_dividing is not None:
            self.found_inf = torch.maximum(self.found_inf, self.found_while_dividing)
        self.inferred = False

    def mend_norm(self) -> None:
        """Takes a norm whose FP32 sum of squares was inf again, within its range, and the clip that it led to. Slow, rare."""
        if self.norm is None:
            return
        exact = statistics.exact_norm(self.gradients, self.scale.device)
        if self.treatment is Treatment.FOLD:
            exact = exact * reciprocal(self.scale)
        self.norm.copy_(exact)  # in place: the caller of clip holds it
        if self.clip_coefficient is not None:
            self.clip_coefficient = None
            self.clip(self.max_norm, trusting=True)

    def recheck(self, optimizer: torch.optim.Optimizer) -> None:
        """Looks at the gradients again, for what has happened to them since; one more read of them."""
        self.gradients = statistics.collect(optimizer)
        again = statistics.total_amax(self.gradients, self.scale.device)
        found = (~again.isfinite()).float()
        if self.agrees:
            found = cast(Tensor, _agreed(found)[0])
        self.found_inf = torch.maximum(self.found_inf, found)


@dataclass(frozen=True)
class Look:
    """What `examine` is to find out beyond whether all is finite.

    Attributes:
        norm: the 2-norm.
        amax: the largest magnitude, which makes `found_inf` exact; otherwise `Boundary.verify` must follow up.
        sample_seed: the underflow fraction, from a sample with this seed; None for not.
        agree: exchange what is local to a rank with the other ranks.
        not_sampled: `id` of the parameters that the format does not bound, because their modules run in FP32.
    """

    norm: bool
    amax: bool
    sample_seed: int | None
    agree: bool
    not_sampled: Collection[int] = ()


def examine(
    optimizer: torch.optim.Optimizer,
    *,
    backward: int,
    scale: Tensor,
    treatment: Treatment,
    losses: int,
    loss_non_finite: Tensor | None,
    look: Look,
) -> Boundary:
    """Finds out what `optimizer`'s gradients are; treats them on the way. No host read.

    Sharded gradients (DTensors) are always divided in place, and their verdict is that of all shards.

    Raises:
        ScalerError: they are to be divided and one is FP16: that would round away what scaling has saved.
    """
    sharded = _is_sharded(optimizer)
    if sharded and treatment is Treatment.FOLD:
        treatment = Treatment.DIVIDE
    gradients = statistics.collect(optimizer)
    underflow = wanted = None
    bounded = statistics.collect(optimizer, look.not_sampled) if look.not_sampled else gradients
    if look.sample_seed is not None and bounded:
        found = samples.underflow(bounded, FP16_FORMAT, look.sample_seed)
        underflow = moved(found.fraction, scale.device)
        wanted = moved(found.cure, scale.device) * scale
    inverse = scale if treatment is Treatment.CHECK else reciprocal(scale)
    found_while_dividing = None
    if treatment is Treatment.DIVIDE:
        refuse_fp16(gradients)
        found_while_dividing = unscale_and_check_(gradients, inverse)
    takes_amax = look.amax or sharded or look.agree
    takes_norm = (look.norm and not sharded) or not takes_amax
    norm, amax = statistics.norm_and_amax(gradients, scale.device, norm=takes_norm, amax=takes_amax)
    if treatment is Treatment.FOLD:
        amax = None if amax is None else amax * inverse
        norm = None if norm is None else norm * inverse
    # Looked for in the unscaled figures: dividing by a scale below 1 can overflow as well.
    magnitude = cast(Tensor, norm if amax is None else amax)
    found_inf = (~(magnitude < math.inf)).float()
    if found_while_dividing is not None:
        found_inf = torch.maximum(found_inf, found_while_dividing)
    if sharded or look.agree:
        agreed = _agreed(found_inf, loss_non_finite, amax, underflow, wanted)
        found_inf = cast(Tensor, agreed[0])
        loss_non_finite, amax, underflow, wanted = agreed[1:]
    return Boundary(
        backward=backward,
        scale=scale,
        gradients=gradients,
        treatment=treatment,
        found_inf=found_inf,
        losses=losses,
        loss_non_finite=loss_non_finite,
        magnitude=magnitude,
        norm=norm if look.norm else None,
        amax=amax,
        underflow_fraction=underflow,
        wanted_scale=wanted,
        inferred=not takes_amax,
        found_while_dividing=found_while_dividing,
        agrees=sharded or look.agree,
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
    if not agreement.is_needed():
        return list(values)
    agreed = iter(agreement.largest_over_ranks(*known))
    return [None if value is None else next(agreed) for value in values]
