"""`attach` under DeepSpeed, which scales losses and skips steps by itself: hf_amp reports what it does, and does nothing itself."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from hf_amp.config import MixedPrecisionConfig
from hf_amp.device import probe
from hf_amp.events import AmpEvent, Cause, EventKind, StepOutcome
from hf_amp.integrations.checkpoint import FINITE_CHECK_FILE
from hf_amp.integrations.trackers import logging_with_metrics
from hf_amp.precision import PrecisionMode
from hf_amp.scaling.policies import scalar
from hf_amp.scaling.scaler import AdvancedGradScaler
from hf_amp.scaling.step import SeenLosses
from hf_amp.serialization import load_file
from hf_amp.session import AmpSession
from hf_amp.statistics import PendingTransfer, all_reduce_max, is_distributed, to_device


class ObservedScaler(AdvancedGradScaler):
    """Counts and reports the steps of a scaler that is not ours, and neither scales nor skips anything.

    What is on the device (losses, the gradient norm) comes to the host without a wait: with the step itself where it
    has arrived by then, or where the step was skipped, else with the next step.
    """

    def __init__(self, config: MixedPrecisionConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self._newest: tuple[StepOutcome, torch.optim.Optimizer, PendingTransfer] | None = None
        self._next_scale = 1.0

    def observe_loss(self, loss: Tensor) -> None:
        """Sees an unscaled loss on its way into backward. No GPU-CPU sync."""
        self._pending.losses.note(loss)

    def note_step(
        self,
        optimizer: torch.optim.Optimizer,
        applied: bool,
        scale: float,
        next_scale: float,
        grad_norm: Tensor | float | None,
    ) -> None:
        """Takes a step that is over into account. Reads the host where it was skipped; all ranks must then call it.

        Args:
            scale: what the gradients' backward used.
            next_scale: what the next one will use.
            grad_norm: 2-norm of the unscaled gradients before clipping; a tensor has one element. None where unknown.
        """
        self.flush()
        self._next_scale = next_scale
        self.decided_steps += 1
        seen, self._pending.losses = self._pending.losses, SeenLosses()
        flags = seen.flags_on(torch.device(self._device))
        bad = torch.zeros((), device=self._device) if flags is None else flags.isnan().float().sum()
        if not applied and self.ranks_agree and is_distributed():
            (bad,) = all_reduce_max(bad)
        norm = grad_norm.detach().reshape(()) if isinstance(grad_norm, Tensor) else scalar(grad_norm or math.nan)
        figures = PendingTransfer({"bad": bad, "norm": to_device(norm, bad.device)})
        attempt = self.decided_steps
        self._newest = StepOutcome(attempt, applied, scale, attempt, losses=seen.number), optimizer, figures
        if not applied or figures.ready():
            self.flush()

    def flush(self) -> None:
        """Waits for the figures of the newest step, and delivers it, unless that has been done."""
        if self._newest is not None:
            (outcome, optimizer, figures), self._newest = self._newest, None
            host = figures.result()
            outcome = dataclasses.replace(
                outcome,
                loss_finite=host["bad"] == 0 if outcome.losses else None,
                non_finite_losses=int(host["bad"]),
                grad_norm=host["norm"] if outcome.applied and math.isfinite(host["norm"]) else None,
            )
            self._count(outcome, optimizer)
        super().flush()

    def get_scale(self) -> float:
        """The scale that the next backward will use, as of the newest step. No GPU-CPU sync."""
        return self._next_scale


_MODES = {
    "fp16": PrecisionMode.FP16,  # half-precision parameters, of which DeepSpeed keeps FP32 masters
    "bf16": PrecisionMode.BF16,
    "fp8": PrecisionMode.BF16,
    "no": PrecisionMode.FP32,
}
_OBSERVING = {
    "enabled", "automatic_fallback", "enable_monitoring", "monitoring_interval", "patience", "on_stalled",
}  # fmt: skip
"""Options that do not act on a step."""
LIMITS = ", which scales losses and skips steps by itself: hf_amp only observes it"
"""To go on with after what runs."""


def observe(accelerator: Accelerator, config: MixedPrecisionConfig) -> AmpSession:
    """A session that reports DeepSpeed's loss scale and skipped steps. What it changes on `accelerator` only watches.

    Raises:
        ConfigError: an option would act.
    """
    acting = {option.name for option in dataclasses.fields(config)} - _OBSERVING
    config.refuse(acting, "DeepSpeed scales losses and skips steps by itself, and hf_amp only observes it")
    mode, device = _MODES[accelerator.mixed_precision], accelerator.device
    autocast = accelerator.deepspeed_plugin.deepspeed_config.get("torch_autocast", {})
    if autocast.get("enabled"):
        mode = PrecisionMode.BF16 if "b" in str(autocast.get("dtype", "bfloat16")) else PrecisionMode.MIXED
    config = dataclasses.replace(config, automatic_fallback=False, emulate=False)
    scaler = ObservedScaler(dataclasses.replace(config, precision_mode=mode), device)
    scaler.ranks_agree = accelerator.num_processes > 1
    hardware = probe(device)
    session = AmpSession(config, scaler, mode, hardware, f"{hardware.describe(mode)} under DeepSpeed")
    if config.enabled:
        _watch_steps(accelerator, session, scaler)
        _keep_progress_in_checkpoints(accelerator, session)
        session.patches.set_attribute(accelerator, "log", logging_with_metrics(accelerator, session))
    return session


def _watch_steps(accelerator: Accelerator, session: AmpSession, scaler: ObservedScaler) -> None:
    """Looks at the engine before and after `accelerator.backward`, in which it steps, for numbers that it has on the host."""
    backward = accelerator.backward
    floor = accelerator.deepspeed_plugin.deepspeed_config.get("fp16", {}).get("min_loss_scale", 1)

    @functools.wraps(backward)
    def run_and_watch(loss: torch.Tensor, **kwargs: Any) -> None:
        engine: Any = accelerator.deepspeed_engine_wrapped.engine
        scaler.observe_loss(loss)
        steps, scale = engine.global_steps, loss_scale(engine)
        backward(loss, **kwargs)
        if engine.global_steps == steps:
            return  # within an accumulation window
        next_scale, of_autocast = loss_scale(engine), autocast_scaler(engine) is not None
        # Without ZeRO, autocast's scaler skips, and the engine never knows.
        applied = engine.was_step_applied() and next_scale >= scale
        norm = engine.get_global_grad_norm() if session.config.enable_monitoring else None
        norm = norm / scale if of_autocast and norm is not None else norm  # which is of scaled gradients then
        scaler.note_step(engine.optimizer, applied, scale, next_scale, norm)
        if next_scale < scale and next_scale <= floor and not of_autocast:
            message = (
                f"DeepSpeed's loss scale has come down to its floor, min_loss_scale={next_scale:g}: one more overflow and ZeRO "
                "ends the run. A scale is no cure for what overflows there: train in BF16 (the bf16 section of the DeepSpeed "
                "config), and let `hf-amp preflight` name the modules that leave FP16."
            )
            seen = (Cause.UNKNOWN, scale, next_scale, (), message)
            session.record(AmpEvent(session.newest_step, EventKind.SCALE_AT_FLOOR, *seen))

    session.patches.set_attribute(accelerator, "backward", run_and_watch)


def loss_scale(engine: Any) -> float:
    """The loss scale that `engine`'s next backward will use; 1 where there is none. No GPU-CPU sync, but one under torch_autocast.

    `engine.loss_scale()` is the configured one, 0 for a dynamic scale.
    """
    scaler = autocast_scaler(engine)
    return float(getattr(engine.optimizer, "loss_scale", 1.0) if scaler is None else scaler.get_scale())


def autocast_scaler(engine: Any) -> torch.amp.GradScaler | None:
    """The scaler of DeepSpeed's torch_autocast in FP16: the engine's own, or with ZeRO the optimizer's. None in another mode."""
    own = getattr(engine, "torch_autocast_z0_gradscaler", None)
    return own or getattr(engine.optimizer, "torch_autocast_gradscaler", None)


def _keep_progress_in_checkpoints(accelerator: Accelerator, session: AmpSession) -> None:
    """Counters and figures go with `save_state` and `load_state`, in a file of their own beside DeepSpeed's."""

    def save(models: Any, weights: Any, folder: str) -> None:
        progress = session.progress()
        if accelerator.is_main_process:
            torch.save(progress, Path(folder) / FINITE_CHECK_FILE)

    def load(models: Any, folder: str) -> None:
        file = Path(folder) / FINITE_CHECK_FILE
        if file.is_file():
            session.load_progress(load_file(file))
            session.begin_at(session.scaler.decided_steps)
        reported = "counters go on from" if file.is_file() else "no counters are in"
        session.note(EventKind.STATE_LOADED, f"{reported} {folder}; the loss scale is DeepSpeed's own to load.")

    session.patches.on_undo(accelerator.register_save_state_pre_hook(save).remove)
    session.patches.on_undo(accelerator.register_load_state_pre_hook(load).remove)
