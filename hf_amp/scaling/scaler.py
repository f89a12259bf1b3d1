"""`AdvancedGradScaler`: a `torch.amp.GradScaler` that never corrupts, never lies and reads the host once a step."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from hf_amp.config import MixedPrecisionConfig
from hf_amp.errors import ScalerError
from hf_amp.precision import PrecisionMode, ScalingStrategy
from hf_amp.scaling.adaptive import AdaptiveScale
from hf_amp.scaling.master_weights import MasterWeights
from hf_amp.scaling.optimizer_step import OptimizerRunner, device_of, is_fused, refuse_closure
from hf_amp.scaling.policies import ConstantScale, DynamicScale, ScalePolicy, observation_of, scalar
from hf_amp.scaling.state import (
    from_state_dict,
    other_options,
    restored,
    state_to_host,
    to_state_dict,
    upgraded,
)
from hf_amp.scaling.step import (
    GradientStep,
    PendingSteps,
    PendingVerdict,
    SeenLosses,
    StatisticsRequest,
    StepOutcome,
    Unscale,
    check_gradients,
    map_losses,
    outcome_now,
    refuse_capture,
)
from hf_amp.serialization import parse
from hf_amp.statistics import collect, to_device, to_host, total_amax

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


class Stateful(Protocol):
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
        self.no_scaling = config.precision_mode in (PrecisionMode.FP32, PrecisionMode.BF16)
        self.decided_steps = 0
        self.applied_steps = 0
        self.skipped_steps = 0
        keeps = config.precision_mode is PrecisionMode.FP16 or config.half_parameters == "master_weights"
        self.master_weights = MasterWeights() if config.enabled and keeps else None
        self.stateful: dict[str, Stateful] = {}
        self._policy = self._chosen_policy()
        self._loaded_state: dict[str, float] = {}

    def _chosen_policy(self) -> ScalePolicy:
        return ConstantScale(1.0) if self.no_scaling else POLICIES[self.config.scaling_strategy](self.config)

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
        if not self._enabled or self.no_scaling:
            return 1.0
        if self._state is None:
            return self._first_scale()
        return to_host({"scale": self._state.scale})["scale"]

    def set_scale(self, scale: float | Tensor) -> None:
        """Makes `scale`, clamped to the bounds, that of the next backward. A guard keeps its scale of 1. No host read."""
        if self._enabled and not self.no_scaling:
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
        fields = state_to_host(state)
        plain = to_state_dict(self.config, fields)
        plain["hf_amp"].update(self.progress())
        return plain

    def progress(self) -> dict[str, Any]:
        """The part of the state that means the same in every precision: counters, and the companions' state."""
        self.flush()
        return {
            "counters": {"applied_steps": self.applied_steps, "skipped_steps": self.skipped_steps},
            "stateful": {
                name: stateful_object.state_dict() for name, stateful_object in self.stateful.items()
            },
        }

    def load_progress(self, saved: Mapping[str, Any]) -> None:
        """Goes on counting from `progress`; what it does not have is left as it is.

        Raises:
            StateError: something in it cannot be; nothing has changed then.
        """
        self.flush()
        progress = upgraded(parse(dict[str, Any], saved, "the progress"))
        counters = parse(dict[str, int], progress.get("counters", {}), "the counters")
        stateful = parse(dict[str, Any], progress.get("stateful", {}), "the stateful parts")
        with self.rollback_on_error():
            for name, state in stateful.items():
                if name in self.stateful:
                    self.stateful[name].load_state_dict(state)
        self.applied_steps = counters.get("applied_steps", self.applied_steps)
        self.skipped_steps = counters.get("skipped_steps", self.skipped_steps)
        self.decided_steps = self.applied_steps + self.skipped_steps

    @contextmanager
    def rollback_on_error(self) -> Iterator[None]:
        """Where an error leaves this context, scale, options, counters and companions are as they were before it."""
        former = dict(vars(self))
        stateful = {name: stateful_object.state_dict() for name, stateful_object in self.stateful.items()}
        try:
            yield
        except BaseException:
            vars(self).update(former)
            for name, state in stateful.items():
                self.stateful[name].load_state_dict(state)
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
        fields = from_state_dict(state_dict, self.config, self._policy.ranges)
        saved = other_options(state_dict, self.config)
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
        if not self.no_scaling:
            own = self.config.init_scale
            if self.config.scaling_strategy is ScalingStrategy.CONSTANT and bounded != own:
                _log.warning(
                    "CONSTANT goes on with the loaded scale %g, not with init_scale=%g", bounded, own
                )
            self._loaded_state, self._init_scale = fields, fields["scale"]
            if self._state is not None:
                self._state = restored(self._state, fields)

    def keep_master_weights(self, optimizer: torch.optim.Optimizer) -> None:
        """Lets `optimizer.state_dict()` carry FP32 master weights, and `load_state_dict` take them, unrounded.

        Happens by itself in the first step. To resume, call it before `optimizer.load_state_dict`, because PyTorch
        rounds what an optimizer loads to the dtype of its parameters. Nothing to do where no masters are kept.
        """
        if self.master_weights is not None:
            self.master_weights.register_optimizer(optimizer)

    def _lazy_init_scale_growth_tracker(self, dev: torch.device | str) -> None:
        """Puts the state on a device. The stock class's name, because accelerate's FSDP2 loading calls it."""
        self._state = self._first_state(dev)

    def _first_state(self, device: torch.device | str) -> Any:
        state = self._policy.init_state(torch.device(device))
        if self.no_scaling or not self._enabled:
            return state
        return restored(state, {**self._loaded_state, "scale": self._first_scale()})

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
            given = to_device(new_scale.reshape(()), current.device, current.dtype)
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


class StepKeeper(ScaleKeeper):
    """The part of `AdvancedGradScaler` that tells which steps are open."""

    def __init__(self, config: MixedPrecisionConfig | None, device: torch.device | str) -> None:
        self._open = PendingSteps()
        self._losses = SeenLosses()
        super().__init__(config, device)

    def abandon_step(self) -> None:
        """Forgets losses and gradients of a step that will not be taken, after an exception in forward or backward."""
        self._open.abandon()
        self._losses = SeenLosses()

    def _losses_behind(self, optimizer: torch.optim.Optimizer) -> SeenLosses:
        """Those of the newest backward passes, which may have been other optimizers' too; none where nobody showed them."""
        return SeenLosses() if self._open.is_scaled_by_hand(optimizer) else self._losses

    def _is_within_step(self) -> bool:
        return bool(self._open)

    def is_waiting(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether `optimizer`'s gradients may be scaled now: a backward has begun since its last step, and it is not stepping."""
        return self._open.is_waiting(optimizer)

    @property
    def _per_optimizer_states(self) -> Any:
        return OptimizerStates(self._open)

    @_per_optimizer_states.setter
    def _per_optimizer_states(self, value: Mapping[int, Any]) -> None:
        if value:
            raise _not_written()
        self.abandon_step()

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Looks at the gradients once more, for what has happened to them since `unscale_`. No host read."""
        record = self._open.current(optimizer)
        if record is None:
            return _found_inf_now(optimizer, self._device)
        record.recheck(optimizer)
        return _found_inf_per_device(record)


class OptimizerStates(MutableMapping[int, Any]):
    """Id of an optimizer → "stage" and "found_inf_per_device" of its step since the last update, as in the stock class.

    The tensor in it is the one that the step is decided by, so that ranks may reduce their verdicts into it. An entry can
    be deleted, which makes the next `unscale_` start anew, but not written: that is an error.
    """

    def __init__(self, open_steps: PendingSteps) -> None:
        self._open = open_steps

    def __getitem__(self, key: int) -> Mapping[str, Any]:
        record = self._open.unobserved().get(key)
        return _EntryOf(stage=_stage(record), found_inf_per_device=_found_inf_per_device(record))

    def __setitem__(self, key: int, value: Any) -> None:
        raise _not_written()

    def __delitem__(self, key: int) -> None:
        self._open.forget(key)

    def __iter__(self) -> Iterator[int]:
        return iter(self._open.unobserved())

    def __contains__(self, key: object) -> bool:
        return key in self._open.unobserved()

    def __len__(self) -> int:
        return len(self._open.unobserved())


class _EntryOf(dict[str, Any]):
    def __setitem__(self, key: str, value: Any) -> None:
        raise _not_written()


def _found_inf_per_device(record: GradientStep | None) -> dict[Any, Tensor]:
    """The verdict on all devices' gradients, by the scale's device; empty where there are none. No host read."""
    if record is None or not record.has_gradients:
        return {}
    if record.inferred and not record.stepped:
        record.verify()
    return {record.found_inf.device: record.found_inf}


def _found_inf_now(optimizer: torch.optim.Optimizer, device: torch.device | str) -> dict[Any, Tensor]:
    """The same, of `optimizer`'s gradients as they are, on `device`. No host read."""
    gradients = collect(optimizer)
    if not gradients:
        return {}
    found = (~total_amax(gradients, torch.device(device)).isfinite()).float()
    return {found.device: found}


def _stage(record: GradientStep | None) -> OptState:
    if record is None or (record.unscale is Unscale.FUSED and not record.stepped):
        return OptState.READY
    return OptState.STEPPED if record.stepped else OptState.UNSCALED


def _not_written() -> ScalerError:
    return ScalerError(
        "_per_optimizer_states can be read here, not written: to start an optimizer's step anew, delete its entry "
        "(_per_optimizer_states.pop(id(optimizer), None)), or all of them (abandon_step())."
    )


StepObserver = Callable[[StepOutcome, torch.optim.Optimizer], None]
StepHook = Callable[[GradientStep, torch.optim.Optimizer], Mapping[str, Tensor]]


class AdvancedGradScaler(StepKeeper):
    """Drop-in for `torch.amp.GradScaler`, with any scaling strategy, a floor, and a truthful account.

    Differences from the stock class, all of them deliberate:

    - A step that is skipped is skipped by not calling the optimizer, fused ones included.
    - Gradients are divided by the scale that their own backward used, whatever `update()` did in between.
    - Unscaling the same gradients twice is harmless, and an optimizer without gradients is no error.
    - A skipped step need not lower the scale (floor, hysteresis, ADAPTIVE): ask `last_outcome.applied`, not `get_scale`.
    - `step` reads the host once. `scale`, `unscale_` and `update` never do; `get_scale` and `state_dict` do.
    - PERFORMANCE_OPTIMIZED with a fused optimizer reads nothing in the step: the optimizer is called and skips on
      the device, counters and outcomes follow one step late, and whoever infers a skip from whether the optimizer
      was called (accelerate, and so the LR schedule) does not notice it.
    - In FP16 (`precision_mode`), or with `half_parameters="master_weights"`, optimizers move FP32 master weights of their
      half-precision parameters, whose gradients are FP32 between `unscale_` and `step`, and None after it.
    - In BF16 and FP32 (`precision_mode`) it is a guard: scale 1, the same check and skip, gradients read once.

    Args:
        config: scaling options; None for the defaults.
        device: where the scale lives, such as "cuda"; None for CUDA where there is one, else the CPU.

    Attributes:
        decided_steps: optimizer steps decided, on the host or on the device.
        applied_steps: optimizer steps that were applied.
        skipped_steps: optimizer steps that were skipped.
        last_outcome: the newest step that is known on the host; None before the first.
        observers: called with (outcome, optimizer) for every step, in the update that follows it.
        master_weights: FP32 copies of half-precision parameters; None where the config asks for none.
        not_sampled: gives `id` of the parameters that FP16 does not bound, because a plan runs their modules in FP32; they
            do not count in the underflow fraction.
        passengers: called with (boundary, optimizer) once gradients are examined, before they are clipped; what they
            return, by name, as tensors of shape [] or [n], comes with the step's one read, in `StepOutcome.extras`.
        companions: objects with `state_dict` and `load_state_dict` whose state is saved within the scaler's, by name.
    """

    def __init__(
        self,
        config: MixedPrecisionConfig | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        fastest = "cuda" if torch.cuda.is_available() else "cpu"
        super().__init__(config, device or fastest)
        self.last_outcome: StepOutcome | None = None
        self.observers: list[StepObserver] = []
        self._application = OptimizerRunner(self.master_weights)
        self.step_hooks: list[StepHook] = []
        self.not_sampled: Callable[[], Collection[int]] = tuple
        self._pending: deque[PendingVerdict] = deque()
        self._undelivered: list[tuple[StepOutcome, torch.optim.Optimizer]] = []
        self._backward_scale: Tensor | None = None

    # ---- backward -------------------------------------------------------------------------------------------

    def scale(self, outputs: Any) -> Any:
        """`outputs` (a tensor, or lists and tuples of them) times the scale. Notes whether they are finite; no host read.

        Raises `ScalerError` where they hold something else, and while a CUDA graph is captured.
        """
        if not self._enabled:
            return outputs
        self._open.begin_backward(self._backward_scale, None if self._state is None else self._state.scale)
        if self._losses.ended:
            self._losses = SeenLosses()
        return map_losses(self._scale_one, outputs)

    def _scale_one(self, loss: Tensor) -> Tensor:
        if not self.no_scaling:
            refuse_capture(loss)
        if self._state is None:
            self._lazy_init_scale_growth_tracker(loss.device)
        scale = self._backward_scale = cast(Tensor, self._state.scale)
        self._losses.note(loss, scale.device)
        return loss if self.no_scaling else loss * to_device(scale, loss.device)

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Lets `optimizer`'s gradients wait while others step and the scale changes, from before its own first step on.

        Only where a loop has several optimizers whose backward passes interleave; otherwise the first step is soon enough.
        """
        self._open.watch(optimizer)

    # ---- step boundary --------------------------------------------------------------------------------------

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides `optimizer`'s gradients by the scale of their backward, in place, so that they can be clipped.

        Calling it again before the next backward changes nothing. No host read.

        Raises:
            ScalerError: no loss was scaled before; gradients are FP16; `step` was called already; or more gradients
                were accumulated on top of ones already unscaled.
        """
        if self._enabled and self.no_scaling:
            self._application.prepare_gradients(optimizer)
        if not self._enabled or self.no_scaling:
            return
        record = self._open.current(optimizer)
        if record is None:
            self._examine(optimizer, Unscale.IN_PLACE)
        elif record.stepped:
            raise ScalerError(
                "unscale_() after step() on the same optimizer: call update() first, then scale(loss).backward()."
            )

    def clip_grad_norm_(self, optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
        """Clips all gradients of `optimizer` to `max_norm` without touching them: `step` divides and clips in one.

        Until then they stay scaled: nobody may look at them or change them in between. Where somebody does, call
        `unscale_` and `torch.nn.utils.clip_grad_norm_` instead. Calling it again clips further. No host read.

        Returns:
            The norm before clipping, unscaled: tensor of shape [], float32. Squares are summed in FP32; a sum that
            is inf although all gradients are finite is mended in place by `step`.
        """
        if not self._enabled or self.no_scaling:
            raise ScalerError("clip_grad_norm_ folds into loss scaling, and this scaler scales nothing.")
        record = self._open.current(optimizer)
        if record is None:
            record = self._examine(optimizer, Unscale.FUSED, norm=True)
        if record.unscale is not Unscale.FUSED:
            held = [p for group in optimizer.param_groups for p in group["params"]]
            return torch.nn.utils.clip_grad_norm_(held, max_norm)
        return record.clip(float(max_norm), trusting=not self._defers(optimizer))

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Runs `optimizer.step()` if all its gradients are finite; skips it by not calling it otherwise.

        Reads the host once; not at all in PERFORMANCE_OPTIMIZED with a fused optimizer. Where the optimizer raises, nothing
        is counted, and the next backward can follow.

        Raises:
            ScalerError: a closure was passed, or `step` was called already since the last `update`.
        """
        if not self._enabled:
            return cast("float | None", optimizer.step(*args, **kwargs))
        refuse_closure(optimizer, args, kwargs)
        record = self._open.current(optimizer)
        if record is None:
            unscale = Unscale.FUSED if is_fused(optimizer) else Unscale.IN_PLACE
            record = self._examine(optimizer, Unscale.NONE if self.no_scaling else unscale)
        elif record.stepped:
            raise ScalerError(
                "step() was already called on this optimizer since the last update(): call update()."
            )
        elif self.config.recheck_gradients:
            record.recheck(optimizer)
        record.stepped = True
        record.lost_update_fraction = self._application.take_lost_update_fraction(optimizer)
        seed = self.decided_steps if self.config.enable_monitoring and self._is_interval() else None
        self.decided_steps += 1
        run = functools.partial(self._application.run, optimizer, record, args, kwargs, sample_seed=seed)
        try:
            result: float | None = self._decide(optimizer, record, run)
        except BaseException:  # such as an optimizer without memory for its state
            record.stepped, record.observed = False, True
            self.decided_steps -= 1
            raise
        self._open.close(optimizer, record)
        return result

    def _decide(self, optimizer: torch.optim.Optimizer, record: GradientStep, run: Callable[..., Any]) -> Any:
        if self._defers(optimizer):
            pending = PendingVerdict(self.decided_steps, record, optimizer)
            result = run(on_device=True)
            self._pending.append(pending)
            return result
        outcome = outcome_now(self.decided_steps, record)
        result = run() if outcome.applied else None
        if not outcome.applied:
            self._application.end_skipped(optimizer)
        self._count(outcome, optimizer)
        return result

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Chooses the next scale from what was examined since the last update. No host read.

        Args:
            new_scale: sets the scale instead: a number or a tensor with one element, clamped to the bounds. A tensor that
                holds NaN, which no host read shows, leaves the scale as it is.

        Raises:
            ScalerError: nothing was examined since the last update, or `new_scale` is not usable.
        """
        if not self._enabled:
            return
        examined = self._open or (self._state is not None and new_scale is not None)
        if not examined and not self.no_scaling:
            raise ScalerError(
                "update() before any step: call scale(loss).backward() and step(optimizer) first."
            )
        if new_scale is not None:
            self.set_scale(new_scale)
        elif not self.no_scaling and (fresh := self._open.unobserved()):
            self._state = self._policy.next_state(self._state, observation_of(list(fresh.values())))
        self._open.end_update()
        self._losses.ended = not self._open
        self._deliver()

    def flush(self) -> None:
        """Waits for verdicts that are still on the device and delivers them; nothing to do unless steps defer."""
        while self._pending:
            pending = self._pending.popleft()
            self._count(pending.outcome(), pending.optimizer)
        self._deliver()

    def _defers(self, optimizer: torch.optim.Optimizer) -> bool:
        return self.config.scaling_strategy is ScalingStrategy.PERFORMANCE_OPTIMIZED and is_fused(optimizer)

    def _count(self, outcome: StepOutcome, optimizer: torch.optim.Optimizer) -> None:
        self.applied_steps += outcome.applied
        self.skipped_steps += not outcome.applied
        self.last_outcome = outcome
        self._undelivered.append((outcome, optimizer))

    def _deliver(self) -> None:
        """Hands every outcome that is known to the observers; asks for deferred ones, but never waits for them.

        Among several ranks it does wait for the one of the step before: observers may exchange what they find, so all
        ranks must come to it at the same step.
        """
        while self._pending and self._pending[0].age(self.decided_steps) >= 1:
            if not (self.ranks_agree or self._pending[0].ready()):
                break
            pending = self._pending.popleft()
            self._count(pending.outcome(), pending.optimizer)
        delivered, self._undelivered = self._undelivered, []
        for outcome, optimizer in delivered:
            for observer in self.observers:
                observer(outcome, optimizer)

    def _examine(
        self, optimizer: torch.optim.Optimizer, unscale: Unscale, norm: bool = False
    ) -> GradientStep:
        scale, seen = self._scale_of_gradients(optimizer), self._losses_behind(optimizer)
        self._application.prepare_gradients(optimizer)
        monitors = self.config.enable_monitoring
        record = check_gradients(
            optimizer,
            backward=self._open.backwards,
            scale=scale,
            unscale=unscale,
            losses=seen.unreported(),
            loss_non_finite=seen.non_finite,
            request=StatisticsRequest(
                norm=norm or (monitors and not self.no_scaling),
                amax=self._policy.needs_amax or self._samples_now() or self._defers(optimizer),
                sample_seed=self.decided_steps if self._samples_now() else None,
                agree=self.ranks_agree,
                not_sampled=self.not_sampled() if self._samples_now() else (),
            ),
        )
        for ask in self.step_hooks:
            record.extras.update(ask(record, optimizer))
        self._open.open(optimizer, record)
        return record

    def _scale_of_gradients(self, optimizer: torch.optim.Optimizer) -> Tensor:
        if self._state is None:
            if not self.no_scaling:
                raise ScalerError(
                    "no loss was scaled before the optimizer's step: call scaler.scale(loss).backward(), or "
                    "accelerator.backward(loss)."
                )
            self._lazy_init_scale_growth_tracker(device_of(optimizer, self._device))
        if self._backward_scale is None or self._open.is_scaled_by_hand(optimizer):
            return cast(Tensor, self._state.scale)
        return self._backward_scale

    def _samples_now(self) -> bool:
        is_wanted = self._policy.needs_underflow or self.config.enable_monitoring
        return is_wanted and not self.no_scaling and self._is_interval()

    def _is_interval(self) -> bool:
        return self.decided_steps % self.config.monitoring_interval == 0
