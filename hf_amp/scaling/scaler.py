"""`AdvancedGradScaler`: a `torch.amp.GradScaler` with any scale policy, a floor, truthful skips, and one sync a step.

Reading order: `scale` (backward), `step` (the check, the verdict, the optimizer), `update` (the next scale).
What a step boundary does to the gradients is in `step.py`, how an optimizer is run in `optimizer_step.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from hf_amp.config import KEEPS_UPDATES, MixedPrecisionConfig
from hf_amp.device import default_device, is_capturing
from hf_amp.emulation import emulated_in_backward
from hf_amp.errors import ScalerError
from hf_amp.events import RepeatLimit, StepOutcome
from hf_amp.precision import PrecisionMode, ScalingStrategy
from hf_amp.scaling import compat
from hf_amp.scaling.master_weights import MasterWeights
from hf_amp.scaling.optimizer_step import WRITTEN, OptimizerRunner, has_closure, is_fused, refuse_closure
from hf_amp.scaling.policies import ConstantScale, Observation, ScalePolicy, policy_of, scalar
from hf_amp.scaling.state import from_state_dict, other_options, restored, to_state_dict, upgraded
from hf_amp.scaling.step import (
    GradientStep,
    LateUpdate,
    PendingOutcome,
    PendingSteps,
    StatisticsRequest,
    StepState,
    Unscale,
    not_finite,
    observe,
)
from hf_amp.scaling.stochastic_rounding import RoundedWeights
from hf_amp.serialization import parse
from hf_amp.statistics import PendingTransfer, held_by, is_main_process, to_device, to_host

if TYPE_CHECKING:
    from torch.distributed.checkpoint.stateful import Stateful

StepObserver = Callable[[StepOutcome, torch.optim.Optimizer], None]
StepHook = Callable[[GradientStep, torch.optim.Optimizer], Mapping[str, Tensor]]

_log = logging.getLogger("hf_amp")
_WHERE_CAUSES_ARE = "A scaler alone does not look for causes: hf_amp.attach and AmpSession.for_model do."


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


def _unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """What accelerate's `AcceleratedOptimizer` wraps, which would come back to the scaler; any other as it is."""
    return cast(Any, optimizer).optimizer if type(optimizer).__name__ == "AcceleratedOptimizer" else optimizer


def _stock_option(name: str) -> Any:
    """An option of the stock class, whose setters set it: kept in the config, and checked as there."""

    def change(scaler: AdvancedGradScaler, value: Any) -> None:
        if value != getattr(scaler.config, name):
            scaler._change_options(**{name: value})

    return property(lambda scaler: getattr(scaler.config, name), change)


class _NonFiniteClosure(Exception):
    """Ends an optimizer's step whose closure has given a non-finite loss or gradient."""


class AdvancedGradScaler(torch.amp.GradScaler):
    """Drop-in for `torch.amp.GradScaler`, with any scaling strategy, a floor, and a truthful account.

    Differences from the stock class, all of them deliberate:

    - A step that is skipped is skipped by not calling the optimizer, fused ones on a CPU included. On a device a fused one is
      launched before the verdict is waited for, and not waited for itself; it skips, and `last_outcome` and accelerate say so.
    - Gradients are divided by the scale that their own backward used, whatever `update()` did in between.
    - Unscaling the same gradients twice is harmless, and an optimizer without gradients is no error.
    - A skipped step need not lower the scale (floor, hysteresis, ADAPTIVE): ask `last_outcome.applied`, not `get_scale`.
    - `step` waits for the device once. `scale`, `unscale_` and `update` never do; `get_scale` and `state_dict` do.
    - A strategy that defers (PERFORMANCE_OPTIMIZED) with a fused optimizer waits for nothing in the step: the optimizer is
      called and skips on the device, counters and outcomes follow one step late, and whoever infers a skip from whether the
      optimizer was called (accelerate, and so the LR schedule) does not notice it.
    - In FP16 (`precision_mode`), or with `half_parameters="master_weights"`, optimizers move FP32 master weights of their
      half-precision parameters, whose gradients are FP32 between `unscale_` and `step`, and None after it.
    - In BF16 and FP32 (`precision_mode`) nothing is scaled: it is the finite check alone, with the same skip.

    Args:
        config: scaling options; None for the defaults.
        device: where losses and gradients are, such as "cuda"; None for the accelerator where there is one, else the CPU.
        policy: chooses the scale in place of the config's strategy.

    Attributes:
        config: the options in force; `growth_factor`, `backoff_factor` and `growth_interval` can be set later.
        no_scaling: whether it is the finite check alone.
        backwards: backward passes begun.
        graph: where that of the newest loss begins; the recorder of forward passes lets go of it before the next.
        decided_steps: optimizer steps decided, on the host or on the device.
        known_steps: those whose outcome the host knows and observers have been told of; they come in order.
        applied_steps: optimizer steps that were applied.
        skipped_steps: optimizer steps that were skipped.
        last_outcome: the newest step that is known on the host; None before the first.
        ranks_agree: whether the processes of a run exchange what each of them has found, and decide alike.
        observers: called with (outcome, optimizer) for every step, in the update that follows it.
        step_hooks: called with (gradient step, optimizer) once gradients are checked, before they are clipped; what they
            return, by name, as tensors of shape [] or [n], comes with the step's one sync, in `StepOutcome.extras`.
        stateful: objects with `state_dict` and `load_state_dict` whose state is saved within the scaler's, by name,
            because Trainer and Accelerator save no other file for us.
        discard_forwards: called where gradients were cleared without a step, before the next backward; False where their
            losses are from the same forward pass as the next, and count on.
        note_loss: called with every loss that goes into backward, where somebody wants to know.
        watch_loss: likewise, with whether it is the first of its step.
        is_waiting: says of an optimizer whether its gradients may be scaled now: a backward has begun since its last step, and
            it is not stepping.
        not_sampled: gives `id` of the parameters that FP16 does not bound, because a plan runs their modules in FP32; they
            do not count in the underflow fraction.
        after_update: called at the end of every update, and wherever outcomes are delivered.
        looks_closely: whether every step is sampled for lost updates.
        master_weights: FP32 copies of half-precision parameters, or what rounds their updates in the place of copies; None
            where the config asks for none.
    """

    def __init__(
        self,
        config: MixedPrecisionConfig | None = None,
        device: torch.device | str | None = None,
        *,
        policy: ScalePolicy | None = None,
    ) -> None:
        options = ", which has the options of torch.amp.GradScaler too (the device is the second argument)"
        self.config = config = MixedPrecisionConfig.or_default(config, type(self).__name__, options)
        if device is None:
            device = default_device()
        self._state: Any = None
        self._former_state: Any = None
        self._if_clean: tuple[Any, ...] = (None, None, None)
        self._late: LateUpdate | None = None
        self._figures_on = torch.device("cpu")
        self._pending = PendingSteps()
        self.is_waiting = self._pending.is_waiting
        super().__init__(
            device=torch.device(device).type,
            init_scale=config.init_scale,
            growth_factor=config.growth_factor,
            backoff_factor=config.backoff_factor,
            growth_interval=config.growth_interval,
            enabled=config.enabled,
        )
        self.no_scaling = config.precision_mode in (PrecisionMode.FP32, PrecisionMode.BF16)
        self.backwards = self.decided_steps = self.known_steps = 0
        self.graph: Any = None
        self.applied_steps = self.skipped_steps = 0
        self.desync: Any = None  # a `DesyncMonitor` where ranks agree
        self.last_outcome: StepOutcome | None = None
        self.ranks_agree = config.sync_grad_scaler or config.distributed_amp
        self.observers: list[StepObserver] = []
        self.step_hooks: list[StepHook] = []
        self.stateful: dict[str, Stateful] = {}
        self.discard_forwards: Callable[[], bool] = lambda: True
        self.is_replaying: Callable[[], bool] = bool
        self.note_loss: Callable[[Tensor], None] | None = None
        self.watch_loss: Callable[[Tensor, bool], None] | None = None
        self.not_sampled: Callable[[], Collection[int]] = tuple
        self.after_update: Callable[[], None] | None = None
        self.looks_closely = False
        self.master_weights = self._masters_for(config)
        if isinstance(self.master_weights, RoundedWeights):
            self.stateful["rounding"] = self.master_weights
        self._runner = OptimizerRunner(self.master_weights)
        self._given_policy = policy
        self._policy = self._chosen_policy()
        self._loaded_state: dict[str, float] = {}
        self._queued: list[PendingOutcome] = []
        self.newest_request: StatisticsRequest | None = None
        self._observed = 0  # the newest attempt that the policy has seen
        self._given_back = 0  # backward passes begun when a scale was given back
        self._undelivered: list[tuple[StepOutcome, torch.optim.Optimizer]] = []
        self._repeats = RepeatLimit()

    @staticmethod
    def _masters_for(config: MixedPrecisionConfig) -> MasterWeights | None:
        keeps = config.half_parameters in KEEPS_UPDATES or config.precision_mode is PrecisionMode.FP16
        if not (config.enabled and keeps):
            return None
        rounds = config.half_parameters in ("stochastic_rounding", "kahan")
        return RoundedWeights(config.half_parameters == "kahan") if rounds else MasterWeights()

    def scale(self, outputs: Any) -> Any:
        """`outputs` (a tensor, or lists and tuples of them) times the scale. Notes whether they are finite; no GPU-CPU sync.

        Raises `ScalerError` where they hold something else, and while a CUDA graph is captured.
        """
        if not self._enabled:
            return outputs
        self._pending.begin_backward(self._scale, self.discard_forwards)
        self.backwards += 1
        return map_losses(self._scale_one, outputs)

    def _scale_one(self, loss: Tensor) -> Tensor:
        if not self.no_scaling and loss.is_cuda and is_capturing(loss.device):
            raise ScalerError(
                "scaler.scale(loss) while a CUDA graph is captured: every replay would scale by what the scale is now, and "
                "steps divide by what it has become. Capture the model alone (torch.cuda.make_graphed_callables), before "
                "hf_amp is attached to it, and scale its loss outside of the graph."
            )
        if self._state is None:
            self._lazy_init_scale_growth_tracker(loss.device)
        scale = self._pending.scale = cast(Tensor, self._scale)
        self._pending.losses.note(loss)
        self.graph = loss.grad_fn if self.observers else None
        if loss.device.type != "cpu":
            self._figures_on = loss.device
        if self.note_loss is not None:
            self.note_loss(loss)
        if self.watch_loss is not None:
            self.watch_loss(loss, self._pending.losses.number == 1)
        # One on the CPU goes into the kernel as its argument.
        scaled = loss if self.no_scaling else loss * (scale if scale.device.type == "cpu" else scale.to(loss.device))
        scaled = emulated_in_backward(scaled)
        self._pending.losses.newest = weakref.ref(scaled)
        if self.ranks_agree and scaled.requires_grad:
            cast(Any, scaled).register_hook(self._pending.losses.begin)
        return scaled

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Lets `optimizer`'s gradients wait while others step and the scale changes, from before its own first step on.

        Only where a loop has several optimizers whose backward passes interleave; otherwise the first step is soon enough.
        """
        self._pending.watch(optimizer)

    def watched_parameters(self) -> list[Tensor]:
        """What the optimizers hold that are known so far."""
        return [p for _, optimizer in self._pending._alive() for p in held_by(optimizer)]

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides `optimizer`'s gradients by the scale of their backward, in place, so that they can be clipped.

        Calling it again before the next backward changes nothing. No GPU-CPU sync.

        Raises:
            ScalerError: no loss was scaled before; gradients are FP16; `step` was called already; or more gradients
                were accumulated on top of ones already unscaled.
        """
        if not self._enabled:
            return
        optimizer = _unwrapped(optimizer)
        if self.no_scaling:
            if self.master_weights is not None:
                self.master_weights.upcast_gradients(optimizer)
            return
        record = self._pending.current(optimizer)
        if record is None:
            self._check(optimizer, Unscale.IN_PLACE)
        elif record.state is StepState.STEPPED:
            raise ScalerError(
                "unscale_() after step() on the same optimizer: call update() first, then scale(loss).backward()."
            )

    def clip_grad_norm_(
        self, optimizer: torch.optim.Optimizer, max_norm: float, *, in_place: bool = False, order: Sequence[Tensor] = ()
    ) -> Tensor:
        """Clips all gradients of `optimizer` to `max_norm` without touching them: `step` divides and clips in one.

        Until then they stay scaled: nobody may look at them or change them in between. Where somebody does, call
        `unscale_` and `torch.nn.utils.clip_grad_norm_` instead. Calling it again clips further. No GPU-CPU sync.

        Args:
            in_place: divide and clip now, in one, so that the gradients can be looked at: the same to the last bit as `unscale_`
                and `torch.nn.utils.clip_grad_norm_` where the scale is a power of two.
            order: the optimizer's parameters in the order that the norm sums them in; empty for its own.

        Returns:
            The norm before clipping, unscaled: tensor of shape [], float32. Squares are summed in FP32; a sum that
            is inf although all gradients are finite is corrected in place by `step`. Where the gradients are clipped in place, or
            the host learns of it too late, it skips the step.
        """
        if not self._enabled or (self.no_scaling and not in_place):
            raise ScalerError("clip_grad_norm_ is part of loss scaling, and this scaler scales nothing.")
        optimizer = _unwrapped(optimizer)
        if self.no_scaling:  # nothing forbids to clip what was clipped before, and to add to it
            self._pending.forget(id(optimizer))
        record = self._pending.current(optimizer)
        if record is None:
            unscale = Unscale.NONE if self.no_scaling else Unscale.FUSED
            record = self._check(optimizer, unscale, norm=True, order=order)
            if (in_place or record.sharded) and record.norm is not None:
                return record.clip_in_place(float(max_norm))
        if record.unscale is not Unscale.FUSED:
            return torch.nn.utils.clip_grad_norm_(list(held_by(optimizer)), max_norm)
        if record.state is StepState.STEPPED:
            self.unscale_(optimizer)  # says that it is too late
        return record.clip(float(max_norm))

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Runs `optimizer.step()` if all its gradients are finite; skips it by not calling it otherwise.

        One GPU-CPU sync; none where the strategy defers and the optimizer is fused; one for each call of a closure. On a device a
        fused optimizer is launched before it, and skips by itself. Where the optimizer raises, nothing is counted, and the next
        backward can follow.

        Raises:
            ScalerError: a closure was passed where something is scaled, or `step` was called already since the last `update`.
        """
        if not self._enabled:
            return cast("float | None", optimizer.step(*args, **kwargs))
        optimizer = _unwrapped(optimizer)
        if self.no_scaling and self.master_weights is None and has_closure(args, kwargs):
            return self._step_with_closure(optimizer, args, kwargs)
        looks = self.looks_closely or self.decided_steps == 1 or self._is_interval()
        samples, defers = self.config.enable_monitoring and looks, self._defers(optimizer)
        refuse_closure(optimizer, args, kwargs)
        lost = self._runner.found.pop(id(optimizer), {})
        if self.no_scaling and self._pending.added_to(optimizer):
            self._pending.forget(id(optimizer))
        record = self._pending.current(optimizer)
        if record is None:
            fused = Unscale.FUSED if is_fused(optimizer) else Unscale.IN_PLACE
            record = self._check(optimizer, Unscale.NONE if self.no_scaling else fused)
        elif record.state is StepState.STEPPED:
            raise ScalerError("step() was already called on this optimizer since the last update(): call update().")
        elif record.was_written_to():
            record.recheck(optimizer)
        record.extras.update(lost)
        begins = self.master_weights is not None and 1 <= self.decided_steps <= 3
        seed = self.decided_steps if samples or begins else None
        stock_step = functools.partial(optimizer.step, *args, **kwargs)
        run = functools.partial(self._runner.run, optimizer, record, stock_step, sample_seed=seed)
        attempt, result, outcome = self.decided_steps + 1, None, None
        record.state = StepState.STEPPED
        try:
            ahead = defers or (record.device.type != "cpu" and is_fused(optimizer) and not record.sharded)
            transfer = PendingTransfer(record.figures()) if ahead else None  # before the optimizer, not behind it
            result = run(on_device=True) if ahead else None
            if transfer is not None and defers:
                self._queued.append(PendingOutcome(attempt, record, optimizer, transfer))
            else:
                if not (self._policy.needs_amax or self._policy.needs_underflow):  # while the host would wait anyhow
                    clean = Observation(scalar(0.0), scalar(0.0), scalar(0.0), known_clean=True)
                    self._if_clean = self._state, self._policy, self._policy.next_state(self._state, clean)
                outcome = record.to_host(attempt, transfer)  # the one GPU-CPU sync
                if outcome.applied and (record.skipped_on_device or not ahead):
                    result = run()
                elif self.master_weights is not None:
                    self.master_weights.downcast_gradients(optimizer)
        except BaseException:  # such as an optimizer without memory for its state
            record.state = StepState.LEFT_OVER  # nothing was applied, and the next backward can follow
            raise
        self._pending.close(optimizer, record)
        self.decided_steps = attempt
        if outcome is not None:
            self._count(outcome, optimizer)
        return result

    def _step_with_closure(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> float | None:
        """Runs a step whose closure runs backward, and checks each call of it.

        The first that gives a non-finite loss or gradient ends the step, which is skipped: parameters are what they were
        before it, and optimizer state that has followed them since begins anew.
        """
        held: list[Tensor] = list(held_by(optimizer))
        before = [p.detach().clone() for p in held]
        records: list[GradientStep] = []  # of the first call, and of the newest

        def call(closure: Any) -> Any:
            begun, loss = self.backwards, closure()
            if loss is not None and self.backwards == begun:  # the closure has shown its loss to nobody
                self.scale(torch.as_tensor(loss))
            record = self._check(optimizer, Unscale.NONE)
            if record.loss_flags is not None:
                # It stands, also where the gradients are finite.
                record.found_while_dividing = not_finite(record.loss_flags).amax()
                record.found_inf = torch.maximum(record.found_inf, record.found_while_dividing)
            records[1:] = [record]
            if not record.to_host(self.decided_steps + 1).applied:
                raise _NonFiniteClosure
            return loss

        def checked(value: Any) -> Any:
            return functools.partial(call, value) if callable(value) else value

        result = None
        try:
            result = optimizer.step(*map(checked, args), **{name: checked(value) for name, value in kwargs.items()})
            if not records:
                call(lambda: None)
        except _NonFiniteClosure:
            with torch.no_grad():
                torch._foreach_copy_(held, before)
            if len(records) > 1:
                optimizer.state.clear()
            records[0] = records[-1]
        records[-1].state = StepState.STEPPED
        self._pending.close(optimizer, records[-1])
        self.decided_steps += 1
        self._count(cast(StepOutcome, records[0].outcome), optimizer)
        return result

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Chooses the next scale from what was checked since the last update. No GPU-CPU sync.

        But one for gradients that were unscaled and whose optimizer has not stepped.

        Args:
            new_scale: sets the scale instead: a number or a tensor with one element, clamped to the bounds. A tensor that
                holds NaN leaves the scale as it is; one on a device is waited for.

        Raises:
            ScalerError: nothing was checked since the last update, or `new_scale` is not usable.
        """
        if not self._enabled:
            return
        fresh = list(self._pending.unobserved().values())
        checked = fresh or self._pending or (self._state is not None and new_scale is not None)
        if not checked and not self.no_scaling:
            raise ScalerError("update() before any step: call scale(loss).backward() and step(optimizer) first.")
        if new_scale is not None:
            self._count_queued()
            self.set_scale(new_scale)
        elif fresh and not self.no_scaling and not self._queued:
            self._former_state, self._observed = self._state, self.decided_steps
            former, policy, state = self._if_clean
            is_known = former is self._state and policy is self._policy and all(map(attrgetter("known_clean"), fresh))
            self._state = state if is_known else self._policy.next_state(self._state, observe(fresh))
        self._pending.end_update()
        self._deliver()
        if self._queued:
            self._choose_late(fresh or [pending.record for pending in self._queued])

    def _choose_late(self, records: list[GradientStep]) -> None:
        """The steps of this update are decided on the device, and so is the next scale, until the host knows them."""
        pending, self._queued = self._queued, []
        if self.no_scaling:
            clean = low = self._state.scale
        else:
            # What an overflow leads to, from the scale that these gradients were made with.
            former = self._state._replace(scale=records[0].scale)
            nothing = scalar(0.0)
            overflow = Observation(scalar(1.0), nothing, scalar(math.inf))
            clean, low = self._state.scale, self._policy.next_state(former, overflow).scale
        self._late = LateUpdate.choose(pending, records, clean, low)

    def _learn(self) -> None:
        """Waits for what the device has decided in the update before: a whole forward and backward pass is queued behind it."""
        late, self._late = self._late, None
        if late is None:
            return
        for pending in late.pending:
            self._count(pending.outcome(), pending.optimizer)
        seen = observe(late.records)
        skipped = any(record.host["found_inf"] for record in late.records)
        if self._pending.scale is late.scale:
            self._pending.scale = late.after_overflow if skipped else late.after_clean
        if not self.no_scaling:
            self._former_state, self._observed = self._state, late.pending[-1].attempt
            # Where the scale was given back meanwhile, an overflow still is that of the one that these were made with. A loss that was
            # not finite is none of the scale's, which the device has lowered for want of knowing.
            bad_losses = sum(record.outcome.non_finite_losses for record in late.records if record.outcome)
            made_with = self._state
            if skipped and not bad_losses:
                made_with = made_with._replace(scale=late.records[0].scale)
            if skipped or late.records[0].backward > self._given_back:  # a clean one at a lower says nothing of it
                self._state = self._policy.next_state(made_with, seen)

    def abandon_step(self) -> None:
        """Forgets losses and gradients of a step that will not be taken, after an exception in forward or backward."""
        self._pending.abandon()

    def flush(self) -> None:
        """Waits for outcomes that are still on the device and delivers them; nothing to do unless steps are deferred."""
        self._learn()
        self._count_queued()
        self._deliver()

    def _count_queued(self) -> None:
        """Waits for the steps that no update has seen: it will know them."""
        queued, self._queued = self._queued, []
        for pending in queued:
            self._count(pending.outcome(), pending.optimizer)

    def _defers(self, optimizer: torch.optim.Optimizer) -> bool:
        # A kept rounding error of half a step may change sides with its parameter, also in a step that the device skips.
        waits = self.config.half_parameters == "kahan" and self.master_weights is not None
        return self.config.scaling_strategy.defers and is_fused(optimizer) and not waits

    def _count(self, outcome: StepOutcome, optimizer: torch.optim.Optimizer) -> None:
        self.applied_steps += outcome.applied
        self.skipped_steps += not outcome.applied
        self.last_outcome = outcome
        if self.master_weights is not None and outcome.extras.get(WRITTEN):
            self.master_weights.follows_data = True
        self._undelivered.append((outcome, optimizer))

    def _deliver(self) -> None:
        """Hands every outcome that is known to the observers, on all ranks at the same step: they may exchange what they find."""
        delivered, self._undelivered = self._undelivered, []
        for outcome, optimizer in delivered:
            for observer in self.observers:
                observer(outcome, optimizer)
            if not (outcome.applied or self.observers):
                self._say_skipped(outcome)
        late = self._late.pending if self._late is not None else []
        self.known_steps = self.decided_steps - len(late) - len(self._queued)
        if self.after_update is not None:
            self.after_update()

    def _say_skipped(self, outcome: StepOutcome) -> None:
        """A console line, as `RepeatLimit` allows: nobody else speaks of it."""
        if not self._repeats.count("skip")[1] or not is_main_process():
            return
        why = "the loss was not finite" if outcome.loss_finite is False else "the gradients overflowed"
        floor = ", the smallest that min_scale allows" * (
            outcome.scale <= self.config.min_scale and not self.no_scaling
        )
        at = "" if self.no_scaling else f" at scale {outcome.scale:g}{floor}"
        so_far = f" ({self.skipped_steps} so far)" if self.skipped_steps > 1 else ""
        _log.warning("hf_amp: step %d was skipped: %s%s%s. %s", outcome.attempt, why, at, so_far, _WHERE_CAUSES_ARE)

    def _check(self, optimizer: torch.optim.Optimizer, unscale: Unscale, **asked: Any) -> GradientStep:
        """Checks `optimizer`'s gradients, which are new, in one pass on their device. `asked`: of a `StatisticsRequest`."""
        self._learn()
        if self._state is None:
            if not self.no_scaling:
                raise ScalerError(
                    "no loss was scaled before the optimizer's step: call scaler.scale(loss).backward(), or "
                    "accelerator.backward(loss)."
                )
            first = next((parameter.device for parameter in held_by(optimizer)), self._device)
            self._lazy_init_scale_growth_tracker(first)
        looks = self.config.enable_monitoring or self._policy.needs_underflow
        samples = looks and not self.no_scaling and self._is_interval()
        request = StatisticsRequest(
            amax=self._policy.needs_amax or samples or self._defers(optimizer),
            sample_seed=self.decided_steps if samples else None,
            agree=self.ranks_agree,
            not_sampled=self.not_sampled() if samples or self._policy.needs_amax else (),
            **asked,
        )
        self.newest_request = request
        if self.master_weights is not None:
            self.master_weights.upcast_gradients(optimizer)
        record = self._pending.check(optimizer, self._state.scale, self._figures_on, unscale, request)
        for hook in self.step_hooks:
            record.extras.update(hook(record, optimizer))
        return record

    def _is_interval(self) -> bool:
        return self.decided_steps % self.config.monitoring_interval == 0

    def get_scale(self) -> float:
        """The scale that the next backward will use. One GPU-CPU sync."""
        if not self._enabled or self.no_scaling:
            return 1.0
        return self._first_scale() if self._state is None else to_host({"scale": cast(Tensor, self._scale)})["scale"]

    def set_scale(self, scale: float | Tensor) -> None:
        """Makes `scale`, clamped to the bounds, that of the next backward; where nothing is scaled it stays 1. No sync for a float."""
        if self._enabled and not self.no_scaling:
            if self._state is None:
                self._lazy_init_scale_growth_tracker(self._device)
            self._learn()
            self._state = self._state._replace(scale=self._checked_scale(scale))

    def forget_step(self, outcome: StepOutcome) -> None:
        """The newest step was skipped for something that no scale cures: the policy is as it was before it. No GPU-CPU sync."""
        if self.no_scaling or self._former_state is None:
            return
        self._given_back = self.backwards
        if outcome.attempt == self._observed:
            self._state = self._former_state
        else:
            self.set_scale(self._state.scale.clamp(min=outcome.scale))  # the step's own may be low for one before it

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

    def _chosen_policy(self) -> ScalePolicy:
        if self.no_scaling:
            return ConstantScale(1.0)
        return self._given_policy or policy_of(self.config.scaling_strategy, self.config)

    def _change_options(self, **options: Any) -> None:
        """Checks the options as a config would, then gives them to the policy; its state stays."""
        self.config = dataclasses.replace(self.config, **options)
        self._policy = self._chosen_policy()

    def _lazy_init_scale_growth_tracker(self, dev: torch.device | str) -> None:
        """Makes the state, for losses and gradients on a device. The stock class's name, because accelerate's FSDP2 loading calls it.

        It is on the CPU: the host knows each step by the time that it asks for the next scale.
        """
        self._figures_on = torch.device(dev)
        self._state = self._first_state()

    def _first_state(self) -> Any:
        state = self._policy.init_state(torch.device("cpu"))
        if self.no_scaling or not self._enabled:
            return state
        return restored(state, {**self._loaded_state, "scale": self._first_scale()})

    def _first_scale(self) -> float:
        """What the stock class calls `_init_scale`, which may be set, or come from a checkpoint, before the first step."""
        return min(max(self._init_scale, self.config.min_scale), self.config.max_scale)

    def state_dict(self) -> dict[str, Any]:
        """Numbers and strings only: the stock scaler's entries, and ours under "hf_amp". One GPU-CPU sync.

        Call it after `update()`. Empty where the scaler is disabled, as in the stock class.
        """
        if not self._enabled:
            return {}
        self.flush()
        state = self._first_state() if self._state is None else self._state
        plain = to_state_dict(self.config, to_host(state._asdict()))
        plain["hf_amp"].update(self.progress())
        return plain

    def progress(self) -> dict[str, Any]:
        """The part of the state that means the same in every precision: counters, and the stateful objects' state."""
        self.flush()
        return {
            "counters": {"applied_steps": self.applied_steps, "skipped_steps": self.skipped_steps},
            "stateful": {name: part.state_dict() for name, part in self.stateful.items()},
        }

    def load_progress(self, saved: Mapping[str, Any], same_precision: bool = True) -> None:
        """Goes on counting from `progress`; what it does not have is left as it is.

        Args:
            same_precision: False where it was saved in another precision: no plan is taken over.

        Raises:
            StateError: something in it cannot be; nothing has changed then.
        """
        self.flush()
        progress = upgraded(parse(dict[str, Any], saved, "the progress"))
        counters = parse(dict[str, int], progress.get("counters", {}), "the counters")
        parts = parse(dict[str, Any], progress.get("stateful", {}), "the stateful parts")
        with self.rollback_on_error():
            for name, state in parts.items():
                if name in self.stateful and (same_precision or name != "fallback"):
                    self.stateful[name].load_state_dict(state)
        self.applied_steps = counters.get("applied_steps", self.applied_steps)
        self.skipped_steps = counters.get("skipped_steps", self.skipped_steps)
        self.decided_steps = self.known_steps = self.applied_steps + self.skipped_steps
        self._pending.leave_over()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from `state_dict`, ours or the stock scaler's, before the first step or later.

        As in the stock class the saved growth and backoff options replace the config's; where they differ, that is
        logged. A scale outside of the bounds is clamped, which is logged too, as is one that CONSTANT keeps in the place of
        `init_scale`. Where nothing is scaled, only the counters are taken over.

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
            _log.warning("the loaded scale %g is out of [min_scale, max_scale]: using %g", fields["scale"], bounded)
            fields["scale"] = bounded
        if self.no_scaling:
            return
        own = self.config.init_scale
        if self.config.scaling_strategy is ScalingStrategy.CONSTANT and bounded != own:
            _log.warning("CONSTANT goes on with the loaded scale %g, not with init_scale=%g", bounded, own)
        self._loaded_state, self._init_scale = fields, fields["scale"]
        if self._state is not None:
            self._state = restored(self._state, fields)

    @contextmanager
    def rollback_on_error(self) -> Iterator[None]:
        """Where an error leaves this context, scale, options, counters and stateful objects are as they were before it."""
        former = dict(vars(self))
        parts = {name: part.state_dict() for name, part in self.stateful.items()}
        try:
            yield
        except BaseException:
            vars(self).update(former)
            for name, state in parts.items():
                self.stateful[name].load_state_dict(state)
            raise

    def keep_master_weights(self, optimizer: torch.optim.Optimizer) -> None:
        """Lets `optimizer.state_dict()` carry FP32 master weights, and `load_state_dict` take them, unrounded.

        Happens by itself in the first step. To resume, call it before `optimizer.load_state_dict`, because PyTorch
        rounds what an optimizer loads to the dtype of its parameters. Nothing to do where no masters are kept.
        """
        if self.master_weights is not None:
            self.master_weights.register_optimizer(optimizer)

    def __getstate__(self) -> dict[str, Any]:
        if self._pending:
            raise ScalerError(
                "a scaler can be pickled between update() and the next unscale_() or step(), not in between."
            )
        return {
            "config": self.config.to_dict(),
            "device": self._device,
            "policy": self._given_policy,
            "state": self.state_dict(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        config = MixedPrecisionConfig.from_dict(state["config"])
        self.__init__(config, state["device"], policy=state.get("policy"))  # type: ignore[misc]
        if state["state"]:
            self.load_state_dict(state["state"])

    _growth_factor = _stock_option("growth_factor")
    _backoff_factor = _stock_option("backoff_factor")
    _growth_interval = _stock_option("growth_interval")

    @property
    def _scale(self) -> Tensor | None:
        if self._late is not None:
            return self._late.scale
        return None if self._state is None else cast(Tensor, self._state.scale)

    @_scale.setter
    def _scale(self, value: Tensor | None) -> None:
        if value is not None:
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

    @property
    def _per_optimizer_states(self) -> Any:
        return compat.OptimizerStates(self._pending)

    @_per_optimizer_states.setter
    def _per_optimizer_states(self, value: Mapping[int, Any]) -> None:
        if value:
            raise compat.not_writable()
        self.abandon_step()

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Looks at the gradients once more, for what has happened to them since `unscale_`. No GPU-CPU sync."""
        record = self._pending.current(optimizer)
        if record is None:
            return compat.found_inf_now(optimizer, self._device)
        record.recheck(optimizer)
        return compat.found_inf_per_device(record)
