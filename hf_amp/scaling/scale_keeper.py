"""Keeps the scale: the policy that chooses it, the policy's state, and both as a checkpoint."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from hf_amp.config import MixedPrecisionConfig
from hf_amp.errors import ScalerError
from hf_amp.plain import read
from hf_amp.precision import PrecisionMode, ScalingStrategy
from hf_amp.scaling import state as state_of_policy
from hf_amp.scaling.adaptive import AdaptiveScale
from hf_amp.scaling.constant import ConstantScale
from hf_amp.scaling.dynamic import DynamicScale
from hf_amp.scaling.master_weights import MasterWeights
from hf_amp.scaling.policy import ScalePolicy, scalar
from hf_amp.statistics import snapshot
from hf_amp.statistics.transfer import moved

POLICIES: Mapping[ScalingStrategy, Callable[[MixedPrecisionConfig], ScalePolicy]] = {
    ScalingStrategy.CONSTANT: ConstantScale.from_config,
    ScalingStrategy.DYNAMIC: DynamicScale.from_config,
    ScalingStrategy.ADAPTIVE: AdaptiveScale.from_config,
    ScalingStrategy.PERFORMANCE_OPTIMIZED: AdaptiveScale.from_config,
}

_log = logging.getLogger("hf_amp")


def _option(name: str) -> Any:
    """An option of the stock class, whose setters set it: kept in the config, and checked as there."""

    def change(scaler: ScaleKeeper, value: Any) -> None:
        if value != getattr(scaler.config, name):
            scaler._change_options(**{name: value})

    return property(lambda scaler: getattr(scaler.config, name), change)


class Companion(Protocol):
    """What rides in the scaler's checkpoint, because Trainer and Accelerator save no other file for us."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class ScaleKeeper(torch.amp.GradScaler):
    """The part of `AdvancedGradScaler` that has nothing to do with gradients: options, scale, counters, checkpoint."""

    def __init__(self, config: MixedPrecisionConfig | None, device: torch.device | str) -> None:
        options = ", which has the options of torch.amp.GradScaler too (the device is the second argument)"
        self.config = config = MixedPrecisionConfig.or_default(config, type(self).__name__, options)
        self._state: Any = None
        super().__init__(
            device=torch.device(device).type,
            init_scale=config.init_scale,
            growth_factor=config.growth_factor,
            backoff_factor=config.backoff_factor,
            growth_interval=config.growth_interval,
            enabled=config.enabled,
        )
        self.guards_only = config.precision_mode in (PrecisionMode.FP32, PrecisionMode.BF16)
        self.decided_steps = 0
        self.applied_steps = 0
        self.skipped_steps = 0
        keeps = config.precision_mode is PrecisionMode.FP16 or config.half_parameters == "master_weights"
        self.master_weights = MasterWeights() if config.enabled and keeps else None
        self.companions: dict[str, Companion] = {}
        self._policy = self._chosen_policy()
        self._loaded_state: dict[str, float] = {}

    def _chosen_policy(self) -> ScalePolicy:
        return ConstantScale(1.0) if self.guards_only else POLICIES[self.config.scaling_strategy](self.config)

    @property
    def ranks_agree(self) -> bool:
        """Whether the processes of a run exchange what each of them has found, and decide alike."""
        return self.config.sync_grad_scaler or self.config.distributed_amp

    def flush(self) -> None:
        """Brings the counters up to date; nothing to do where they always are."""

    def _is_within_step(self) -> bool:
        """Whether gradients have been examined for a step that is not over."""
        return False

    def get_scale(self) -> float:
        """The scale that the next backward will use. Reads the host."""
        if not self._enabled or self.guards_only:
            return 1.0
        if self._state is None:
            return self._first_scale()
        return snapshot.read({"scale": self._state.scale})["scale"]

    def set_scale(self, scale: float | Tensor) -> None:
        """Makes `scale`, clamped to the bounds, that of the next backward. A guard keeps its scale of 1. No host read."""
        if self._enabled and not self.guards_only:
            if self._state is None:
                self._lazy_init_scale_growth_tracker(self._device)
            self._state = self._state._replace(scale=self._checked_scale(scale))

    def _change_options(self, **options: Any) -> None:
        """Checks the options as a config would, then gives them to the policy; its state stays."""
        self.config = dataclasses.replace(self.config, **options)
        self._policy = self._chosen_policy()

    def state_dict(self) -> dict[str, Any]:
        """Numbers and strings only: the stock scaler's entries, and ours under "hf_amp". Reads the host.

        Call it after `update()`. Empty where the scaler is disabled, as in the stock class.
        """
        if not self._enabled:
            return {}
        self.flush()
        state = self._first_state("cpu") if self._state is None else self._state
        fields = state_of_policy.read_fields(state)
        plain = state_of_policy.to_plain(self.config, fields)
        plain["hf_amp"].update(self.progress())
        return plain

    def progress(self) -> dict[str, Any]:
        """The part of the state that means the same in every precision: counters, and the companions' state."""
        self.flush()
        return {
            "counters": {"applied_steps": self.applied_steps, "skipped_steps": self.skipped_steps},
            "companions": {name: companion.state_dict() for name, companion in self.companions.items()},
        }

    def load_progress(self, saved: Mapping[str, Any]) -> None:
        """Goes on counting from `progress`; what it does not have is left as it is.

        Raises:
            StateError: something in it cannot be; nothing has changed then.
        """
        self.flush()
        progress = read(dict[str, Any], saved, "the progress")
        counters = read(dict[str, int], progress.get("counters", {}), "the counters")
        companions = read(dict[str, Any], progress.get("companions", {}), "the companions")
        with self.all_or_nothing():
            for name, state in companions.items():
                if name in self.companions:
                    self.companions[name].load_state_dict(state)
        self.applied_steps = counters.get("applied_steps", self.applied_steps)
        self.skipped_steps = counters.get("skipped_steps", self.skipped_steps)
        self.decided_steps = self.applied_steps + self.skipped_steps

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Where an error leaves this context, scale, options, counters and companions are as they were before it."""
        former = dict(vars(self))
        companions = {name: companion.state_dict() for name, companion in self.companions.items()}
        try:
            yield
        except BaseException:
            vars(self).update(former)
            for name, state in companions.items():
                self.companions[name].load_state_dict(state)
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from `state_dict`, ours or the stock scaler's, before the first step or later.

        As in the stock class the saved growth and backoff options replace the config's; where they differ, that is
        logged. A scale outside of the bounds is clamped, which is logged too, as is one that CONSTANT keeps in the place of
        `init_scale`. A guard keeps its scale of 1: it takes over the counters only.

        Raises:
            StateError: it is not a scaler's state; nothing has changed then.
        """
        if not self._enabled:
            return
        fields = state_of_policy.from_plain(state_dict, self.config, self._policy.ranges)
        saved = state_of_policy.other_options(state_dict, self.config)
        self.load_progress(state_dict.get("hf_amp", {}))
        if saved:
            _log.warning("the loaded scaler state replaces the config's options: %s", saved)
            self._change_options(**saved)
        bounded = min(max(fields["scale"], self.config.min_scale), self.config.max_scale)
        if bounded != fields["scale"]:
            _log.warning(
                "the loaded scale %g is out of [min_scale, max_scale]: using %g", fields["scale"], bounded
            )
            fields["scale"] = bounded
        if not self.guards_only:
            own = self.config.init_scale
            if self.config.scaling_strategy is ScalingStrategy.CONSTANT and bounded != own:
                _log.warning(
                    "CONSTANT goes on with the loaded scale %g, not with init_scale=%g", bounded, own
                )
            self._loaded_state, self._init_scale = fields, fields["scale"]
            if self._state is not None:
                self._state = state_of_policy.restored(self._state, fields)

    def keep_master_weights(self, optimizer: torch.optim.Optimizer) -> None:
        """Lets `optimizer.state_dict()` carry FP32 master weights, and `load_state_dict` take them, unrounded.

        Happens by itself in the first step. To resume, call it before `optimizer.load_state_dict`, because PyTorch
        rounds what an optimizer loads to the dtype of its parameters. Nothing to do where no masters are kept.
        """
        if self.master_weights is not None:
            self.master_weights.adopt(optimizer)

    def _lazy_init_scale_growth_tracker(self, dev: torch.device | str) -> None:
        """Puts the state on a device. The stock class's name, because accelerate's FSDP2 loading calls it."""
        self._state = self._first_state(dev)

    def _first_state(self, device: torch.device | str) -> Any:
        state = self._policy.init_state(torch.device(device))
        if self.guards_only or not self._enabled:
            return state
        return state_of_policy.restored(state, {**self._loaded_state, "scale": self._first_scale()})

    def _first_scale(self) -> float:
        """What the stock class calls `_init_scale`, which may be set, or come from a checkpoint, before the first step."""
        return min(max(self._init_scale, self.config.min_scale), self.config.max_scale)

    # ---- attributes of the stock class, which others read and set ------------------------------------------------

    @property
    def _scale(self) -> Tensor | None:
        return None if self._state is None else cast(Tensor, self._state.scale)

    @_scale.setter
    def _scale(self, value: Tensor | None) -> None:
        if value is None:
            return
        if self._state is None:
            self._lazy_init_scale_growth_tracker(value.device)
        self.set_scale(value)

    @property
    def _growth_tracker(self) -> Tensor | None:
        if self._state is None:
            return None
        return getattr(self._state, "growth_tracker", scalar(0, torch.int32, self._state.scale.device))

    @_growth_tracker.setter
    def _growth_tracker(self, value: Tensor | int | None) -> None:
        if value is not None and hasattr(self._state, "growth_tracker"):
            tracker = torch.zeros_like(self._state.growth_tracker).copy_(torch.as_tensor(value))
            self._state = self._state._replace(growth_tracker=tracker)

    _growth_factor = _option("growth_factor")
    _backoff_factor = _option("backoff_factor")
    _growth_interval = _option("growth_interval")

    def _checked_scale(self, new_scale: float | Tensor) -> Tensor:
        current: Tensor = self._state.scale
        if isinstance(new_scale, Tensor):
            if new_scale.numel() != 1 or new_scale.requires_grad:
                raise ScalerError(
                    f"the loss scale was to be a tensor of shape {tuple(new_scale.shape)}: it must have one element and not "
                    "require grad; pass a float or new_scale.detach()."
                )
            given = moved(new_scale.reshape(()), current.device, current.dtype)
            chosen = torch.where(given.isnan(), current, given)
        elif isinstance(new_scale, (int, float)) and math.isfinite(new_scale) and new_scale > 0:
            chosen = torch.full_like(current, new_scale)
        else:
            raise ScalerError(f"the loss scale was to be {new_scale!r}: pass a positive finite number.")
        return chosen.clamp(self.config.min_scale, self.config.max_scale)

    def __getstate__(self) -> dict[str, Any]:
        if self._is_within_step():
            raise ScalerError(
                "a scaler can be pickled between update() and the next unscale_() or step(), not in between."
            )
        return {
            "config": self.config.to_dict(),
            "device": self._device,
            "state": self.state_dict(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(MixedPrecisionConfig.from_dict(state["config"]), state["device"])  # type: ignore[misc]
        if state["state"]:
            self.load_state_dict(state["state"])
