"""`AdvancedGradScaler`: a `torch.amp.GradScaler` that never corrupts, never lies and reads the host once a step."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from hf_amp.config import MixedPrecisionConfig
from hf_amp.errors import ScalerError
from hf_amp.precision import ScalingStrategy
from hf_amp.scaling.application import Application, device_of, is_fused, refuse_closure
from hf_amp.scaling.boundary import Boundary, Look, Treatment, examine
from hf_amp.scaling.loss import SeenLosses, map_losses, refuse_capture
from hf_amp.scaling.optimizer_states import StepKeeper
from hf_amp.scaling.outcome import StepOutcome
from hf_amp.scaling.policy import observation_of
from hf_amp.scaling.verdict import PendingVerdict, outcome_now
from hf_amp.statistics.transfer import moved

StepObserver = Callable[[StepOutcome, torch.optim.Optimizer], None]
Passenger = Callable[[Boundary, torch.optim.Optimizer], Mapping[str, Tensor]]


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
            return, by name, as tensors of shape [] or [n], comes with the step's one read, in `StepOutcome.carried`.
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
        self._application = Application(self.master_weights)
        self.passengers: list[Passenger] = []
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
        if not self.guards_only:
            refuse_capture(loss)
        if self._state is None:
            self._lazy_init_scale_growth_tracker(loss.device)
        scale = self._backward_scale = cast(Tensor, self._state.scale)
        self._losses.note(loss, scale.device)
        return loss if self.guards_only else loss * moved(scale, loss.device)

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
        if self._enabled and self.guards_only:
            self._application.ready_gradients(optimizer)
        if not self._enabled or self.guards_only:
            return
        boundary = self._open.current(optimizer)
        if boundary is None:
            self._examine(optimizer, Treatment.DIVIDE)
        elif boundary.stepped:
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
        if not self._enabled or self.guards_only:
            raise ScalerError("clip_grad_norm_ folds into loss scaling, and this scaler scales nothing.")
        boundary = self._open.current(optimizer)
        if boundary is None:
            boundary = self._examine(optimizer, Treatment.FOLD, norm=True)
        if boundary.treatment is not Treatment.FOLD:
            held = [p for group in optimizer.param_groups for p in group["params"]]
            return torch.nn.utils.clip_grad_norm_(held, max_norm)
        return boundary.clip(float(max_norm), trusting=not self._defers(optimizer))

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
        boundary = self._open.current(optimizer)
        if boundary is None:
            treatment = Treatment.FOLD if is_fused(optimizer) else Treatment.DIVIDE
            boundary = self._examine(optimizer, Treatment.CHECK if self.guards_only else treatment)
        elif boundary.stepped:
            raise ScalerError(
                "step() was already called on this optimizer since the last update(): call update()."
            )
        elif self.config.recheck_gradients:
            boundary.recheck(optimizer)
        boundary.stepped = True
        boundary.lost_update_fraction = self._application.take_lost_update_fraction(optimizer)
        seed = self.decided_steps if self.config.enable_monitoring and self._is_interval() else None
        self.decided_steps += 1
        run = functools.partial(self._application.run, optimizer, boundary, args, kwargs, sample_seed=seed)
        try:
            result: float | None = self._decide(optimizer, boundary, run)
        except BaseException:  # such as an optimizer without memory for its state
            boundary.stepped, boundary.observed = False, True
            self.decided_steps -= 1
            raise
        self._open.close(optimizer, boundary)
        return result

    def _decide(self, optimizer: torch.optim.Optimizer, boundary: Boundary, run: Callable[..., Any]) -> Any:
        if self._defers(optimizer):
            pending = PendingVerdict(self.decided_steps, boundary, optimizer)
            result = run(on_device=True)
            self._pending.append(pending)
            return result
        outcome = outcome_now(self.decided_steps, boundary)
        result = run() if outcome.applied else None
        if not outcome.applied:
            self._application.leave_out(optimizer)
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
        if not examined and not self.guards_only:
            raise ScalerError(
                "update() before any step: call scale(loss).backward() and step(optimizer) first."
            )
        if new_scale is not None:
            self.set_scale(new_scale)
        elif not self.guards_only and (fresh := self._open.unobserved()):
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
        self, optimizer: torch.optim.Optimizer, treatment: Treatment, norm: bool = False
    ) -> Boundary:
        scale, seen = self._scale_of_gradients(optimizer), self._losses_behind(optimizer)
        self._application.ready_gradients(optimizer)
        monitors = self.config.enable_monitoring
        boundary = examine(
            optimizer,
            backward=self._open.backwards,
            scale=scale,
            treatment=treatment,
            losses=seen.untold(),
            loss_non_finite=seen.non_finite,
            look=Look(
                norm=norm or (monitors and not self.guards_only),
                amax=self._policy.needs_amax or self._samples_now() or self._defers(optimizer),
                sample_seed=self.decided_steps if self._samples_now() else None,
                agree=self.ranks_agree,
                not_sampled=self.not_sampled() if self._samples_now() else (),
            ),
        )
        for ask in self.passengers:
            boundary.carried.update(ask(boundary, optimizer))
        self._open.open(optimizer, boundary)
        return boundary

    def _scale_of_gradients(self, optimizer: torch.optim.Optimizer) -> Tensor:
        if self._state is None:
            if not self.guards_only:
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
        return is_wanted and not self.guards_only and self._is_interval()

    def _is_interval(self) -> bool:
        return self.decided_steps % self.config.monitoring_interval == 0
