"""How an optimizer is run on checked gradients: fused or not, on the parameters or on their master weights."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from hf_amp.errors import ScalerError
from hf_amp.patch_log import removal
from hf_amp.precision import HALF_DTYPES
from hf_amp.scaling.master_weights import MasterWeights, half_parameters
from hf_amp.scaling.step import GradientStep, Unscale
from hf_amp.statistics import LostUpdates, to_device

WRITTEN = "written_through_data"
"""Name of the figure above 0 where parameters with master weights were written to through `.data`."""
LOST_OF_EACH = "lost_update_fraction_of_each"
"""Name of the figure of shape [n]: the lost share of the due updates of every half-precision parameter that the optimizer holds."""


class OptimizerRunner:
    """How one scaler's optimizers are run.

    Args:
        masters: FP32 copies of their half-precision parameters; None where none are kept.

    Attributes:
        found: `id` of an optimizer → what its newest sampled step has found, to be read with the next one, because a step's own
            figures are taken before it moves anything. "lost_update_fraction", the share of the due updates of low-precision
            elements that rounding lost, shape []; `LOST_OF_EACH`; NaN where the device skipped the step; `WRITTEN`, shape [].
            Float32, where the figures are.
    """

    def __init__(self, masters: MasterWeights | None) -> None:
        self._masters = masters
        self.found: dict[int, dict[str, Tensor]] = {}
        self._rates: dict[
            int, tuple[float | None, float]
        ] = {}  # `id` of a parameter group → its newest learning rate, and the largest

    def run(
        self,
        optimizer: torch.optim.Optimizer,
        record: GradientStep,
        step: Callable[[], float | None],
        *,
        on_device: bool = False,
        sample_seed: int | None = None,
    ) -> float | None:
        """Runs the optimizer on `record`'s gradients. No GPU-CPU sync, unless some of several devices' are on the CPU.

        Args:
            step: the optimizer's, with its arguments.
            on_device: the verdict is not known on the host: a fused optimizer reads it on the device. Otherwise the
                gradients were found finite.
            sample_seed: takes the lost-update fraction, from a sample with this seed; None for not.
        """
        if self._masters is not None:
            written: list[Tensor] | None = None if sample_seed is None else []
            in_parts = treats_each_by_itself(optimizer)
            run = functools.partial(self._masters.run, optimizer, step, found=written, in_parts=in_parts)
            result = _apply(optimizer, record, run, on_device)
            if written:
                self.found[id(optimizer)] = {
                    WRITTEN: torch.stack([to_device(f, record.device) for f in written]).amax()
                }
            return result
        apply = functools.partial(_apply, optimizer, record, step, on_device)
        if sample_seed is None:
            return apply()
        rates, half = self._learning_rates(optimizer), half_parameters(optimizer)
        if not any(p.grad is not None for p in half) or rounds_by_itself(optimizer):
            return apply()
        updates = LostUpdates(half, sample_seed)
        result = apply()
        flags = [
            rate
            for rate, group in zip(rates, optimizer.param_groups, strict=True)
            for p in group["params"]
            if p.dtype in HALF_DTYPES
        ]
        found = updates.after([moves for moves, _ in flags], [is_typical for _, is_typical in flags])
        # A step that the device has skipped changed nothing, and lost nothing.
        skipped = record.found_inf > 0
        self.found[id(optimizer)] = {
            name: torch.where(skipped, torch.nan, to_device(shares, skipped.device))
            for name, shares in zip(("lost_update_fraction", LOST_OF_EACH), found, strict=True)
        }
        return result

    def _learning_rates(self, optimizer: torch.optim.Optimizer) -> list[tuple[bool, bool]]:
        """Of every parameter group, whether its learning rate is above 0, and whether it is typical of the run.

        That is one of at least half of the largest that the group has had or names, and no longer rising: at the beginning of
        a warm-up and at the end of a schedule updates are small on purpose. One that is on a GPU is not looked at.
        """
        found: list[tuple[bool, bool]] = []
        for group in optimizer.param_groups:
            rate = group.get("lr", 1.0)
            if isinstance(rate, Tensor) and rate.device.type != "cpu":
                rate = 1.0
            rate, (former, largest) = float(rate), self._rates.get(id(group), (None, 0.0))
            named = [float(group[name]) for name in ("initial_lr", "max_lr") if name in group]
            rises = rate > former if former is not None else not named
            largest = max(rate, largest, *named)
            self._rates[id(group)] = (rate, largest)
            found.append((rate > 0, not rises and rate >= largest / 2))
        return found


def rounds_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `optimizer` rounds stochastically or keeps rounding errors, by its own options: what it leaves is not lost."""
    options = {**getattr(optimizer, "defaults", {}), **_attributes_of(optimizer)}
    return any(value is True and ("stochastic_round" in name or "kahan" in name) for name, value in options.items())


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `optimizer` divides by `grad_scale` and skips by `found_inf` itself.

    Not so what wraps such a one, which would not hand them on; nor those that take the scaler itself as an argument
    (Apex), which without it are like any other.
    """
    name = "_step_supports_amp_scaling"
    if not getattr(optimizer, name, False):
        return False
    own = hasattr(type(optimizer), name) or name in _attributes_of(optimizer)
    return own and not _takes_scaler(type(optimizer).step)


_BY_PARAMETER = ("torch.optim.", "torchao.optim.", "transformers.optimization")


def treats_each_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `optimizer` can be stepped on some of its parameters at a time.

    So the classes of these packages, which count steps by parameter; others may take norms over all (LAMB), or count in
    their groups (schedule-free, Prodigy). Not where anybody else has a hook on its steps, who would see several.
    """
    hooks = [*_attributes_of(optimizer).get("_optimizer_step_pre_hooks", {}).values()]
    hooks += _attributes_of(optimizer).get("_optimizer_step_post_hooks", {}).values()
    ours = all(isinstance(hook, RefuseScaledStep) for hook in hooks)
    return ours and type(optimizer).__module__.startswith(_BY_PARAMETER)


def _attributes_of(optimizer: torch.optim.Optimizer) -> Mapping[str, Any]:
    """Those of its own, without what a `__getattr__` finds elsewhere."""
    try:
        return cast(Mapping[str, Any], object.__getattribute__(optimizer, "__dict__"))
    except AttributeError:
        return {}


@functools.cache
def _takes_scaler(step: Callable[..., Any]) -> bool:
    return "grad_scaler" in inspect.signature(step).parameters


def has_closure(arguments: tuple[Any, ...], options: Mapping[str, Any]) -> bool:
    """Whether `optimizer.step` was given a closure."""
    return options.get("closure") is not None or any(callable(argument) for argument in arguments)


def refuse_closure(optimizer: torch.optim.Optimizer, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """Raises `ScalerError` where `optimizer.step` was given a closure."""
    if has_closure(arguments, options):
        raise ScalerError(
            f"{type(optimizer).__name__}.step with a closure cannot be loss-scaled, because the closure runs backward "
            "several times within one step; use an optimizer without a closure, or FP32 or BF16, without master weights."
        )


def _apply(
    optimizer: torch.optim.Optimizer, record: GradientStep, step: Callable[[], float | None], on_device: bool
) -> float | None:
    fused_in = record.unscale is Unscale.FUSED
    if not is_fused(optimizer) or not (fused_in or on_device):
        if fused_in:
            record.multiply_in()
        return step()
    # The contract between fused optimizers and torch.amp.GradScaler: they divide by `grad_scale` and do nothing
    # where `found_inf` is not 0.
    fused = cast(Any, optimizer)
    fused.grad_scale = fused.found_inf = None
    if fused_in:
        scale, clip = record.scale, record.clip_coefficient
        fused.grad_scale = _readable(record, to_device(scale, record.device) if clip is None else scale / clip)
    if on_device:  # where it is known, asking costs a pass over counters
        fused.found_inf = _readable(record, record.found_inf)
    try:
        return step()
    finally:
        del fused.grad_scale, fused.found_inf


def _readable(record: GradientStep, figure: Tensor) -> Tensor:
    """`figure` where a fused optimizer finds it: where the figures are, or on the CPU where that has gradients as well.

    It copies to its parameters' devices without waiting, and on the CPU uses what is there by then.
    """
    if figure.device.type != "cpu" and any(gradient.device.type == "cpu" for gradient in record.gradients):
        return to_device(figure, torch.device("cpu"))
    return figure


class RefuseScaledStep:
    """A hook before the step of an optimizer, or of one inside of it: an error past the scaler, while gradients are scaled."""

    def __init__(self, is_waiting: Callable[[torch.optim.Optimizer], bool], outer: torch.optim.Optimizer) -> None:
        self._is_waiting, self._outer = is_waiting, weakref.ref(outer)

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        outer = self._outer()
        if outer is None or not self._is_waiting(outer):
            return
        whose = "the optimizer itself" if optimizer is outer else f"its own by {type(outer).__name__}"
        raise ScalerError(
            f"{type(optimizer).__name__}.step() was called on {whose}, and the gradients are still multiplied by the loss "
            "scale: step what accelerator.prepare(optimizer) has returned, in a loop without accelerate call "
            "session.scaler.step(optimizer), or call session.detach() first. An optimizer that steps in parts (SAM's first_step "
            "and second_step) needs BF16 or FP32, where nothing is scaled."
        )


def install_refusal(
    optimizer: torch.optim.Optimizer, is_waiting: Callable[[torch.optim.Optimizer], bool]
) -> Callable[[], None]:
    """Puts such a hook on `optimizer` and on those that it holds, as SAM and Lookahead do; returns what undoes it."""
    hook, held = RefuseScaledStep(is_waiting, optimizer), [optimizer]
    for each in held:
        for value in _attributes_of(each).values():
            inside = list(value.values()) if isinstance(value, dict) else value
            items = inside if isinstance(inside, (list, tuple)) else [inside]
            held += [x for x in items if isinstance(x, torch.optim.Optimizer) and not any(x is known for known in held)]
    return removal([each.register_step_pre_hook(hook) for each in held if hasattr(each, "_optimizer_step_pre_hooks")])
