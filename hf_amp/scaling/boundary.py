"""One optimizer's gradients at a step boundary: examined on their device, decided on with one host read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from hf_amp.config import FP16_FORMAT
from hf_amp.errors import ScalerError
from hf_amp.scaling.outcome import StepOutcome
from hf_amp.scaling.unscale import reciprocal, unscale_and_check_
from hf_amp.statistics import gradients as statistics
from hf_amp.statistics import snapshot


@dataclass
class Boundary:
    """What is known of one optimizer's gradients, from their examination until the update after their step."""

    backward: int
    """Number of the backward that made the gradients."""
    scale: Tensor
    """The scale which that backward used; shape [], float32."""
    gradients: list[Tensor]
    found_inf: Tensor
    """Above 0 where an element is not finite; shape [], float32."""
    unscaled: bool
    """Whether the gradients have been divided by the scale."""
    figures: dict[str, Tensor]
    """What the outcome reports, still on the device; each of shape []."""
    stepped: bool = False
    """Whether the optimizer's step has been decided."""
    observed: bool = False
    """Whether the policy has seen `found_inf`."""


def examine(
    optimizer: torch.optim.Optimizer,
    *,
    backward: int,
    scale: Tensor,
    divide: bool,
    measure: bool,
    sample: bool,
) -> Boundary:
    """Looks at `optimizer`'s gradients, and divides them by `scale` on the way if `divide`. No host read.

    Args:
        measure: also take norm and amax, which are reported unscaled and before any clipping.
        sample: also sample the underflow fraction.

    Raises:
        ScalerError: `divide`, and a gradient is FP16: unscaling it in place would round what scaling has saved.
    """
    gradients = statistics.collect(optimizer)
    figures: dict[str, Tensor] = {}
    if sample and gradients:
        figures["underflow_fraction"] = statistics.underflow_fraction(gradients, FP16_FORMAT)
    inverse = reciprocal(scale)
    if divide:
        if any(gradient.dtype == torch.float16 for gradient in gradients):
            raise ScalerError(
                "the optimizer holds FP16 parameters, whose gradients cannot be unscaled in place: keep trainable "
                "parameters in FP32 (model.float(), or dtype=torch.float32 in from_pretrained); autocast casts them."
            )
        found_inf = unscale_and_check_(gradients, inverse)
        if measure:
            figures.update(statistics.measure(gradients, scale.device)._asdict())
    else:
        scaled = statistics.measure(gradients, scale.device)
        found_inf = (~scaled.amax.isfinite()).float()
        if measure:
            figures.update(norm=scaled.norm * inverse, amax=scaled.amax * inverse)
    return Boundary(backward, scale, gradients, found_inf, divide, figures)


def decide(boundary: Boundary, loss_finite: Tensor | None) -> StepOutcome:
    """What is to become of the step. One host read; on an overflow one more, to count what is not finite."""
    figures = dict(boundary.figures, found_inf=boundary.found_inf, scale=boundary.scale)
    if loss_finite is not None:
        figures["loss_finite"] = loss_finite
    host = snapshot.read(figures)
    applied = host["found_inf"] == 0
    infinite, nan = (0, 0) if applied else statistics.count_non_finite(boundary.gradients)

    def finite(name: str) -> float | None:
        value = host.get(name, math.nan)
        return value if math.isfinite(value) else None

    return StepOutcome(
        applied=applied,
        scale=host["scale"],
        loss_finite=bool(host.get("loss_finite", 1.0)),
        grad_norm=finite("norm") if applied else None,
        grad_amax=finite("amax") if applied else None,
        underflow_fraction=finite("underflow_fraction"),
        inf_elements=infinite,
        nan_elements=nan,
    )


def apply(optimizer: torch.optim.Optimizer, boundary: Boundary, *args: Any, **kwargs: Any) -> float | None:
    """Runs the optimizer on gradients that were found finite; one that is fused divides them itself if need be."""
    if boundary.unscaled:
        return cast("float | None", optimizer.step(*args, **kwargs))
    # The contract between fused optimizers and torch.amp.GradScaler: they divide by `grad_scale`.
    fused = cast(Any, optimizer)
    fused.grad_scale, fused.found_inf = boundary.scale, boundary.found_inf
    try:
        return cast("float | None", optimizer.step(*args, **kwargs))
    finally:
        del fused.grad_scale, fused.found_inf
