"""`attach`: hf_amp on an `accelerate.Accelerator`, before or after `prepare`."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from hf_amp.config import LOOP_OPTIONS, MixedPrecisionConfig
from hf_amp.errors import AttachError, ConfigError
from hf_amp.events import EventKind
from hf_amp.fallback.ladder import common_to_ranks
from hf_amp.hardware import probe
from hf_amp.integrations import deepspeed, float8
from hf_amp.integrations.adoption import adopt_models, lead_autocast
from hf_amp.integrations.checkpoint import keep_state_in_checkpoints
from hf_amp.integrations.communication import reduce_gradients_in_half, refuse_uneven_inputs
from hf_amp.integrations.optimizers import DecidedOptimizers, NoRawStep
from hf_amp.integrations.parameter_precision import SettledParameters
from hf_amp.integrations.trackers import merge_metrics_into_logs
from hf_amp.integrations.upstream import has_step_hooks, prepared_optimizers
from hf_amp.precision import PrecisionMode
from hf_amp.scaling.scaler import AdvancedGradScaler
from hf_amp.session import AmpSession

_SESSION = "_hf_amp_session"
_MODES = {
    "fp16": PrecisionMode.MIXED,
    "bf16": PrecisionMode.BF16,
    "fp8": PrecisionMode.BF16,  # what modules run in that are not converted to FP8
    "no": PrecisionMode.FP32,
}
_SUPPORTED = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.FSDP,
    DistributedType.DEEPSPEED,
)


def attach(accelerator: Accelerator, config: MixedPrecisionConfig | None = None) -> AmpSession:
    """Puts hf_amp to work on `accelerator` and on everything it has prepared or will prepare.

    Args:
        accelerator: with `mixed_precision` "fp16", "bf16", "fp8" or "no", which is followed; one process, or several with
            DistributedDataParallel or FSDP. Under FSDP modules do not fall back, and causes are looked for in weights
            only: a forward pass of a shard cannot be repeated by one rank. FP8, which another library runs, is guarded as
            BF16 is, without fallback. DeepSpeed, which scales and skips by itself, is only observed.
        config: options; None for the defaults.

    Returns:
        The session. `session.detach()`, or leaving it as a context manager, gives everything its former state.

    Raises:
        ConfigError: `config.precision_mode` contradicts the accelerator, or an option cannot be followed there.
        AttachError: the accelerator runs something that hf_amp does not support, or has a session already; or a prepared
            model has half-precision parameters that `config.half_parameters` does not allow.
    """
    _check_supported(accelerator)
    config = MixedPrecisionConfig.or_default(
        config, "hf_amp.attach", ", whose from_dict and from_file read options from elsewhere"
    )
    config.refuse(
        LOOP_OPTIONS,
        "only the trainers and the manager of hf_amp follow it; set what Trainer or Accelerator has for it",
    )
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        session, limits = deepspeed.observe(accelerator, config), deepspeed.LIMITS
        if config.enabled:
            session.changes.set_attribute(accelerator, _SESSION, session)
    else:
        session, limits = _decide_steps(accelerator, config)
    what = session.what_runs() + limits if config.enabled else "disabled by the config"
    if not config.enabled:
        session.described_as = "without hf_amp, which the config disables"
    session.note(
        EventKind.ATTACHED,
        f"hf_amp is attached: {what}.",
        device=str(accelerator.device),
        precision=session.asked_for.value,
        strategy=config.scaling_strategy.value,
    )
    return session


def _decide_steps(accelerator: Accelerator, config: MixedPrecisionConfig) -> tuple[AmpSession, str]:
    """A session that decides which optimizer steps are applied, and what else it leaves alone, for people."""
    limits = ""
    if accelerator.distributed_type is DistributedType.FSDP:
        # Forward passes of a shard wait for those of the other ranks: none is repeated to find a cause, or changed.
        config = dataclasses.replace(config, automatic_fallback=False)
        limits = "; under FSDP it scales and skips, and modules do not fall back"
    float8_runner = float8.runner_on(accelerator)
    if float8_runner is not None:
        config, limits = float8.guarding_only(config, float8_runner), float8.limits(float8_runner)
    mode = _mode_of(accelerator, config)
    device = accelerator.device
    scaler = AdvancedGradScaler(
        dataclasses.replace(
            config,
            precision_mode=mode,
            sync_grad_scaler=config.sync_grad_scaler or accelerator.num_processes > 1,
        ),
        device,
    )
    session = AmpSession(config, scaler, mode, common_to_ranks(probe(device), device))
    session.pace.devices = (device,)
    session.folds_clipping = config.fold_clipping is True
    if float8_runner is not None:
        session.described_as = float8.describe(float8_runner, session.hardware)
        session.repeat_no_forward()
    if scaler.is_enabled():
        try:
            _take_over(accelerator, session)
        except Exception:
            session.changes.undo()  # an attach that fails has changed nothing
            raise
    return session, limits


def _take_over(accelerator: Accelerator, session: AmpSession) -> None:
    """All that `attach` changes on `accelerator`, and on what it has prepared or will prepare."""
    session.changes.set_attribute(accelerator, _SESSION, session)
    reduce_gradients_in_half(accelerator, session)
    refuse_uneven_inputs(accelerator, session)
    optimizers = DecidedOptimizers(accelerator, session)
    merge_metrics_into_logs(accelerator, session)
    keep_state_in_checkpoints(accelerator, session, optimizers)
    sharded = accelerator.distributed_type is DistributedType.FSDP
    if not session.scaler.guards_only:
        _scale_losses(accelerator, session)
        if not sharded:  # a rank knows the norm of its own shards only
            _fold_clipping(accelerator, session, optimizers)
    else:
        _show_losses(accelerator, session)
        if session.scaler.master_weights is not None:
            _widen_gradients_before_clipping(accelerator, session, optimizers)
    if sharded:
        return
    adopt_models(accelerator, session)
    lead_autocast(accelerator, session)
    SettledParameters(accelerator, session)


def session_of(accelerator: Any) -> AmpSession | None:
    """The session that is attached to `accelerator`; None where there is none."""
    return cast("AmpSession | None", getattr(accelerator, _SESSION, None))


def _check_supported(accelerator: Accelerator) -> None:
    if not isinstance(accelerator, Accelerator):
        raise AttachError(
            f"hf_amp.attach got {type(accelerator).__name__}: pass an accelerate.Accelerator. For a Trainer add "
            "hf_amp.MixedPrecisionCallback() to its callbacks instead."
        )
    if hasattr(accelerator, _SESSION) and not _end_released_session(accelerator):
        raise AttachError(
            "this Accelerator has an hf_amp session already: use that one, or call its detach() first."
        )
    if accelerator.distributed_type not in _SUPPORTED:
        raise AttachError(
            f"hf_amp does not support {accelerator.distributed_type.value}: Megatron-LM, for one, scales losses and skips "
            "steps by itself, and two scalers on one loss are wrong. Use one process, or several with "
            "DistributedDataParallel (MULTI_GPU, MULTI_CPU), FSDP or DeepSpeed, or leave attach out."
        )


def _end_released_session(accelerator: Accelerator) -> bool:
    """Detaches a session that has trained and whose objects `free_memory()` has released; says whether it did."""
    session: AmpSession = getattr(accelerator, _SESSION)
    if session.scaler.decided_steps == 0 or prepared_optimizers(accelerator):
        return False
    session.detach()
    return True


def _mode_of(accelerator: Accelerator, config: MixedPrecisionConfig) -> PrecisionMode:
    if accelerator.mixed_precision not in _MODES:
        raise AttachError(
            f"hf_amp does not support mixed_precision={accelerator.mixed_precision!r} yet: use 'fp16', 'bf16', 'fp8' or 'no'."
        )
    mode = _MODES[accelerator.mixed_precision]
    if mode is PrecisionMode.MIXED and config.precision_mode is PrecisionMode.FP16:
        return PrecisionMode.FP16  # the same arithmetic, on half-precision parameters
    dynamic = config.precision_mode is PrecisionMode.DYNAMIC and mode is not PrecisionMode.FP32
    if config.precision_mode not in (None, mode) and not dynamic:
        raise ConfigError(
            f"MixedPrecisionConfig(precision_mode={config.precision_mode.value}) contradicts "
            f"mixed_precision={accelerator.mixed_precision!r} of the Accelerator (in a Trainer: fp16 and bf16 of "
            f"TrainingArguments), which is {mode.value}: leave precision_mode out, or make the two agree."
        )
    return mode


def _show_losses(accelerator: Accelerator, session: AmpSession) -> None:
    """Lets a guard see every loss, which `accelerator.backward` shows to none but a scaler. No host read."""
    backward = accelerator.backward

    @functools.wraps(backward)
    def show_and_run_backward(loss: Any, **kwargs: Any) -> None:
        backward(session.scaler.scale(loss), **kwargs)

    session.changes.set_attribute(accelerator, "backward", show_and_run_backward)


def _scale_losses(accelerator: Accelerator, session: AmpSession) -> None:
    """Makes `accelerator.backward` scale with the session's scaler, which goes on where a used stock one was."""
    stock = accelerator.scaler
    if stock is None and accelerator.scaler_handler is not None:  # accelerate makes none on a CPU
        stock = torch.amp.GradScaler(accelerator.device.type, **accelerator.scaler_handler.to_kwargs())
    if stock is not None and stock.is_enabled():
        used = stock.state_dict()
        if used != type(stock)(accelerator.device.type).state_dict():
            session.scaler.load_state_dict(used)  # resumed, or made with GradScalerKwargs
    session.changes.set_attribute(accelerator, "scaler", session.scaler)


def _fold_clipping(accelerator: Accelerator, session: AmpSession, optimizers: DecidedOptimizers) -> None:
    """Lets `accelerator.clip_grad_norm_` fold into the optimizer step where the session says that nobody looks."""
    clip_grad_norm_ = accelerator.clip_grad_norm_

    @functools.wraps(clip_grad_norm_)
    def clip_or_fold(parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        if session.folds_clipping and norm_type == 2 and len(optimizers.adopted) == 1:
            (optimizer,) = optimizers.adopted
            inner = optimizer.optimizer
            if _holds_exactly(inner, parameters) and not has_step_hooks(inner, besides=NoRawStep):
                return session.scaler.clip_grad_norm_(inner, max_norm)
        return clip_grad_norm_(parameters, max_norm, norm_type)

    session.changes.set_attribute(accelerator, "clip_grad_norm_", clip_or_fold)


def _widen_gradients_before_clipping(
    accelerator: Accelerator, session: AmpSession, optimizers: DecidedOptimizers
) -> None:
    """Lets clipping see the FP32 gradients that master weights are moved by, also where no loss is scaled."""
    unscale_gradients = accelerator.unscale_gradients

    @functools.wraps(unscale_gradients)
    def widen(optimizer: Any = None) -> None:
        for each in optimizers.adopted:
            session.scaler.unscale_(each.optimizer)
        unscale_gradients(optimizer)

    session.changes.set_attribute(accelerator, "unscale_gradients", widen)


def _holds_exactly(optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor]) -> bool:
    """Whether the gradients of `parameters` are those that `optimizer` will apply, all of them and no other."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
    return held == {id(p) for p in parameters if p.grad is not None}
