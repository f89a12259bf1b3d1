"""`AdvancedGradScaler`: a `torch.amp.GradScaler` that never corrupts, never lies and reads the host once a step."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from hf_amp.config import MixedPrecisionConfig, PrecisionMode, ScalingStrategy
from hf_amp.errors import ScalerError
from hf_amp.scaling import state as state_of_policy
from hf_amp.scaling.boundary import Boundary, apply, decide, examine
from hf_amp.scaling.constant import ConstantScale
from hf_amp.scaling.dynamic import DynamicScale
from hf_amp.scaling.outcome import StepOutcome
from hf_amp.scaling.policy import Observation, ScalePolicy, scalar
from hf_amp.statistics import snapshot

_POLICIES: Mapping[ScalingStrategy, Callable[[MixedPrecisionConfig], ScalePolicy]] = {
    ScalingStrategy.CONSTANT: ConstantScale.from_config,
    ScalingStrategy.DYNAMIC: DynamicScale.from_config,
}

_log = logging.getLogger("hf_amp")

StepObserver = Callable[[StepOutcome, torch.optim.Optimizer], None]


class Companion(Protocol):
    """What rides in the scaler's checkpoint, because Trainer and Accelerator save no other file for us."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class AdvancedGradScaler(torch.amp.GradScaler):
    """Drop-in for `torch.amp.GradScaler`, with any scaling strategy, a floor, and a truthful account.

    Differences from the stock class, all of them deliberate:

    - A step that is skipped is skipped by not calling the optimizer, fused ones included.
    - Gradients are divided by the scale that their own backward used, whatever `update()` did in between.
    - Unscaling the same gradients twice is harmless, and an optimizer without gradients is no error.
    - `step` reads the host once. `scale`, `unscale_` and `update` never do; `get_scale` and `state_dict` do.

    Args:
        config: scaling options; None for the defaults.
        device: where the scale lives, such as "cuda"; None for CUDA where there is one, else the CPU.

    Attributes:
        applied_steps: optimizer steps that were applied.
        skipped_steps: optimizer steps that were skipped.
        last_outcome: the newest step; None before the first.
        observers: called with (outcome, optimizer) for every step, in the update that follows it.
        companions: objects with `state_dict` and `load_state_dict` whose state is saved within the scaler's, by name.
    """

    def __init__(
        self,
        config: MixedPrecisionConfig | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        config = config if config is not None else MixedPrecisionConfig()
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        scales = config.precision_mode not in (PrecisionMode.FP32, PrecisionMode.BF16)
        super().__init__(
            device=torch.device(device).type,
            init_scale=config.init_scale,
            growth_factor=config.growth_factor,
            backoff_factor=config.backoff_factor,
            growth_interval=config.growth_interval,
            enabled=config.enabled and scales,
        )
        self.config = config
        self.applied_steps = 0
        self.skipped_steps = 0
        self.last_outcome: StepOutcome | None = None
        self.observers: list[StepObserver] = []
        self.companions: dict[str, Companion] = {}
        self._policy = _POLICIES[config.scaling_strategy](config)
        self._state: Any = None
        self._loaded_state: dict[str, float] | None = None
        self._boundaries: dict[int, Boundary] = {}
        self._undelivered: list[tuple[StepOutcome, torch.optim.Optimizer]] = []
        self._backwards = 0
        self._backward_scale: Tensor | None = None
        self._loss_finite: Tensor | None = None

    # ---- backward -------------------------------------------------------------------------------------------

    def scale(self, outputs: Any) -> Any:
        """`outputs` (a tensor, or lists and tuples of them) times the scale. Notes whether they are finite; no host read."""
        if not self._enabled:
            return outputs
        self._backwards += 1
        return self._scale_nested(outputs)

    def _scale_nested(self, outputs: Any) -> Any:
        if isinstance(outputs, Tensor):
            if self._state is None:
                self._lazy_init_scale_growth_tracker(outputs.device)
            self._backward_scale = self._state.scale
            self._note_loss(outputs)
            return outputs * self._backward_scale.to(outputs.device, non_blocking=True)
        if isinstance(outputs, (list, tuple)):
            return type(outputs)(self._scale_nested(item) for item in outputs)
        if hasattr(outputs, "__iter__") and not isinstance(outputs, (str, bytes)):
            return map(self._scale_nested, outputs)
        raise ScalerError(
            f"AdvancedGradScaler.scale got {type(outputs).__name__}: pass a tensor or an iterable of tensors."
        )

    def _note_loss(self, outputs: Tensor) -> None:
        finite = outputs.detach().isfinite().all().to(self._state.scale.device, non_blocking=True)
        self._loss_finite = finite if self._loss_finite is None else self._loss_finite & finite

    # ---- step boundary --------------------------------------------------------------------------------------

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides `optimizer`'s gradients by the scale of their backward, in place, so that they can be clipped.

        Calling it again before the next backward changes nothing. No host read.

        Raises:
            ScalerError: no loss was scaled before; gradients are FP16; `step` was called already; or more gradients
                were accumulated on top of ones already unscaled.
        """
        if not self._enabled:
            return
        boundary = self._current_boundary(optimizer)
        if boundary is None:
            self._examine(optimizer, divide=True)
        elif boundary.stepped:
            raise ScalerError(
                "unscale_() after step() on the same optimizer: call update() first, then scale(loss).backward()."
            )

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Runs `optimizer.step()` if all its gradients are finite; skips it by not calling it otherwise.

        Reads the host once. A fused optimizer that was not unscaled divides by the scale itself.

        Raises:
            ScalerError: a closure was passed, or `step` was called already since the last `update`.
        """
        if not self._enabled:
            return cast("float | None", optimizer.step(*args, **kwargs))
        if kwargs.get("closure") is not None or any(callable(argument) for argument in args):
            raise ScalerError(
                f"{type(optimizer).__name__}.step with a closure cannot be loss-scaled, because the closure runs "
                "backward several times within one step; use an optimizer without a closure, or FP32 or BF16."
            )
        boundary = self._current_boundary(optimizer)
        if boundary is not None and boundary.stepped:
            raise ScalerError(
                "step() was already called on this optimizer since the last update(): call update()."
            )
        if boundary is None:
            fused = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
            boundary = self._examine(optimizer, divide=not fused)
        outcome = decide(boundary, self._loss_finite)
        result = None
        if outcome.applied:
            result = apply(optimizer, boundary, *args, **kwargs)
            self.applied_steps += 1
        else:
            self.skipped_steps += 1
        boundary.stepped = True
        boundary.gradients = []
        self.last_outcome = outcome
        self._undelivered.append((outcome, optimizer))
        return result

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Chooses the next scale from what was examined since the last update. No host read.

        Args:
            new_scale: sets the scale instead: a number or a tensor with one element, clamped to the bounds.

        Raises:
            ScalerError: nothing was examined since the last update, or `new_scale` is not usable.
        """
        if not self._enabled:
            return
        if self._state is None or (new_scale is None and not self._boundaries):
            raise ScalerError(
                "update() before any step: call scale(loss).backward() and step(optimizer) first."
            )
        if new_scale is not None:
            self._set_state(self._state._replace(scale=self._checked_scale(new_scale)))
        else:
            fresh = [b.found_inf for b in self._boundaries.values() if not b.observed]
            if fresh:
                found_inf = fresh[0] if len(fresh) == 1 else torch.stack(fresh).amax()
                loss_finite = self._loss_finite
                if loss_finite is None:
                    loss_finite = torch.ones((), dtype=torch.bool, device=found_inf.device)
                self._set_state(self._policy.next_state(self._state, Observation(found_inf, loss_finite)))
        for boundary in self._boundaries.values():
            boundary.observed = True
        self._boundaries = {key: b for key, b in self._boundaries.items() if not b.stepped}
        if not self._boundaries:
            self._loss_finite = None
        delivered, self._undelivered = self._undelivered, []
        for outcome, optimizer in delivered:
            for observer in self.observers:
                observer(outcome, optimizer)

    def _current_boundary(self, optimizer: torch.optim.Optimizer) -> Boundary | None:
        """What was examined of these very gradients; None where they are new since."""
        boundary = self._boundaries.get(id(optimizer))
        if boundary is None or boundary.backward == self._backwards or boundary.stepped:
            return boundary
        if boundary.observed:  # left over from before an update: the next backward made new gradients
            del self._boundaries[id(optimizer)]
            return None
        raise ScalerError(
            "more gradients were accumulated onto ones that unscale_() had divided already: call unscale_() or clip "
            "only after the last backward of the accumulation window."
        )

    def _examine(self, optimizer: torch.optim.Optimizer, divide: bool) -> Boundary:
        if self._backward_scale is None:
            raise ScalerError(
                "no loss was scaled before the optimizer's step: call scaler.scale(loss).backward(), or "
                "accelerator.backward(loss)."
            )
        steps = self.applied_steps + self.skipped_steps
        boundary = examine(
            optimizer,
            backward=self._backwards,
            scale=self._backward_scale,
            divide=divide,
            measure=self.config.enable_monitoring,
            sample=self.config.enable_monitoring and steps % self.config.monitoring_interval == 0,
        )
        self._boundaries[id(optimizer)] = boundary
        return boundary

    # ---- scale and state ------------------------------------------------------------------------------------

    def get_scale(self) -> float:
        """The scale that the next backward will use. Reads the host."""
        if not self._enabled:
            return 1.0
        if self._state is None:
            return (self._loaded_state or {}).get("scale", self._init_scale)
        return snapshot.read({"scale": self._state.scale})["scale"]

    def set_growth_factor(self, new_factor: float) -> None:
        """Changes the growth factor from now on."""
        self._change_options(growth_factor=new_factor)

    def set_backoff_factor(self, new_factor: float) -> None:
        """Changes the backoff factor from now on."""
        self._change_options(backoff_factor=new_factor)

    def set_growth_interval(self, new_interval: int) -> None:
        """Changes the growth interval from now on."""
        self._change_options(growth_interval=new_interval)

    def _change_options(self, **options: Any) -> None:
        """Checks the options as a config would, then gives them to the policy; its state stays."""
        self.config = dataclasses.replace(self.config, **options)
        self._policy = _POLICIES[self.config.scaling_strategy](self.config)
        self._growth_factor = self.config.growth_factor
        self._backoff_factor = self.config.backoff_factor
        self._growth_interval = self.config.growth_interval

    def state_dict(self) -> dict[str, Any]:
        """Numbers and strings only: the stock scaler's entries, and ours under "hf_amp". Reads the host.

        Call it after `update()`. Empty where the scaler is disabled, as in the stock class.
        """
        if not self._enabled:
            return {}
        if self._state is not None:
            fields = state_of_policy.read_fields(self._state)
        else:
            untouched = self._policy.init_state(torch.device("cpu"))
            fields = state_of_policy.read_fields(
                state_of_policy.restored(untouched, self._loaded_state or {})
            )
        counters = {"applied_steps": self.applied_steps, "skipped_steps": self.skipped_steps}
        plain = state_of_policy.to_plain(self.config, fields, counters)
        plain["hf_amp"]["companions"] = {
            name: companion.state_dict() for name, companion in self.companions.items()
        }
        return plain

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from `state_dict`, ours or the stock scaler's, before the first step or later.

        As in the stock class the saved growth and backoff options replace the config's; where they differ, that is
        logged. A scale outside of the bounds is clamped, which is logged too.

        Raises:
            StateError: it is not a scaler's state.
        """
        if not self._enabled:
            return
        fields, counters = state_of_policy.from_plain(state_dict, self.config)
        saved = {
            name: state_dict[name]
            for name in state_of_policy.STOCK_OPTIONS
            if state_dict.get(name, getattr(self.config, name)) != getattr(self.config, name)
        }
        if saved:
            _log.warning("the loaded scaler state replaces the config's options: %s", saved)
            self._change_options(**saved)
        bounded = min(max(fields["scale"], self.config.min_scale), self.config.max_scale)
        if bounded != fields["scale"]:
            _log.warning(
                "the loaded scale %g is out of [min_scale, max_scale]: using %g", fields["scale"], bounded
            )
            fields["scale"] = bounded
        self._loaded_state = fields
        if self._state is not None:
            self._set_state(state_of_policy.restored(self._state, fields))
        self.applied_steps = counters.get("applied_steps", self.applied_steps)
        self.skipped_steps = counters.get("skipped_steps", self.skipped_steps)
        for name, companion_state in state_dict.get("hf_amp", {}).get("companions", {}).items():
            if name in self.companions:
                self.companions[name].load_state_dict(companion_state)

    def _lazy_init_scale_growth_tracker(self, dev: torch.device | str) -> None:
        """Puts the state on a device. The stock class's name, because accelerate's FSDP2 loading calls it."""
        state = self._policy.init_state(torch.device(dev))
        self._set_state(state_of_policy.restored(state, self._loaded_state or {}))

    def _set_state(self, state: Any) -> None:
        """Keeps the two attributes of the stock class, which other libraries read, in step with the policy's state."""
        self._state = state
        self._scale = state.scale
        tracker = getattr(state, "growth_tracker", None)
        self._growth_tracker = scalar(0, torch.int32, state.scale.device) if tracker is None else tracker

    def _checked_scale(self, new_scale: float | Tensor) -> Tensor:
        current: Tensor = self._state.scale
        if isinstance(new_scale, Tensor):
            if new_scale.numel() != 1 or new_scale.requires_grad:
                raise ScalerError(
                    "update(new_scale): a tensor must have one element and not require grad, got shape "
                    f"{tuple(new_scale.shape)}; pass a float or new_scale.detach()."
                )
            chosen = new_scale.reshape(()).to(current)
        elif isinstance(new_scale, (int, float)) and math.isfinite(new_scale) and new_scale > 0:
            chosen = torch.full_like(current, new_scale)
        else:
            raise ScalerError(f"update(new_scale={new_scale!r}): pass a positive finite number.")
        return chosen.clamp(self.config.min_scale, self.config.max_scale)

    def __getstate__(self) -> dict[str, Any]:
        if self._boundaries:
            raise ScalerError(
                "a scaler can be pickled between update() and the next unscale_() or step(), not in between."
            )
        return {
            "config": self.config.to_dict(),
            "device": self._device,
            "state": self.state_dict(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        AdvancedGradScaler.__init__(self, MixedPrecisionConfig.from_dict(state["config"]), state["device"])
        if state["state"]:
            self.load_state_dict(state["state"])
