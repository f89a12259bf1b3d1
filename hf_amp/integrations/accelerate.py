"""`attach`: hf_amp on an `accelerate.Accelerator`, before or after `prepare`."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import (
    AutocastKwargs,
    DDPCommunicationHookType,
    DistributedType,
    convert_outputs_to_fp32,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_amp.config import LOOP_OPTIONS, MixedPrecisionConfig
from hf_amp.device import probe
from hf_amp.errors import AttachError, ConfigError
from hf_amp.events import EventKind
from hf_amp.fallback.module_precision import ForwardContext
from hf_amp.fallback.plan import common_to_ranks
from hf_amp.integrations import deepspeed, float8
from hf_amp.integrations._compat import (
    forward_before_autocast,
    has_step_hooks,
    prepared_models,
    prepared_optimizers,
)
from hf_amp.integrations.checkpoint import keep_state_in_checkpoints
from hf_amp.integrations.optimizers import PreparedOptimizers, RefuseScaledStep
from hf_amp.integrations.trackers import merge_metrics_into_logs
from hf_amp.patch_log import PatchLog
from hf_amp.precision import NumberFormat, PrecisionMode
from hf_amp.scaling.master_weights import MasterWeights, convert_parameters, upcast_state
from hf_amp.scaling.scaler import AdvancedGradScaler
from hf_amp.session import AmpSession


class ParameterConversion:
    """Settles what becomes of half-precision parameters, now and whenever the accelerator prepares more.

    Args:
        accelerator: with what it has prepared already.
        session: whose config decides.

    Raises:
        AttachError: `half_parameters` forbids what a model has, or it cannot be converted any more.
    """

    def __init__(self, accelerator: Accelerator, session: AmpSession) -> None:
        self._accelerator, self._session = accelerator, session
        self._masters = session.scaler.master_weights
        # Inside DDP a change of dtype would cut parameters off from the reduction of their gradients. accelerate lists
        # models as they were before it wrapped them.
        self._in_ddp = accelerator.num_processes > 1
        self._optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._converted_models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._converted: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._evaluating: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        if self._masters is not None:
            session.changes.on_undo(functools.partial(self._release, self._masters))
        for optimizer in prepared_optimizers(accelerator):
            self._register_optimizer(optimizer.optimizer)
        for model in prepared_models(accelerator):
            self._convert_model(model, fixed=self._in_ddp)
        self._convert_what_is_prepared()

    def _convert_what_is_prepared(self) -> None:
        prepare_model, prepare_optimizer = (
            self._accelerator.prepare_model,
            self._accelerator.prepare_optimizer,
        )

        @functools.wraps(prepare_model)
        def convert_and_prepare_model(
            model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
        ) -> Any:
            if evaluation_mode:
                self._evaluating.add(self._accelerator.unwrap_model(model))
            else:
                self._convert_model(model, fixed=isinstance(model, DistributedDataParallel))
            return prepare_model(model, device_placement, evaluation_mode)

        @functools.wraps(prepare_optimizer)
        def register_and_prepare_optimizer(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            # Before, because preparing loads the optimizer's state, which rounds it to what its parameters are.
            self._register_optimizer(
                optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
            )
            return prepare_optimizer(optimizer, *args, **kwargs)

        changes = self._session.changes
        changes.set_attribute(self._accelerator, "prepare_model", convert_and_prepare_model)
        changes.set_attribute(self._accelerator, "prepare_optimizer", register_and_prepare_optimizer)

    def _convert_model(self, wrapped: nn.Module, fixed: bool) -> None:
        model, session = self._accelerator.unwrap_model(wrapped), self._session
        if model in self._converted_models:
            return
        event = convert_parameters(
            model, session.config, session.plan.default, self._optimizers, self._masters, fixed
        )
        self._converted_models.add(model)
        if event is not None:
            session.record(event)
            if event.kind is EventKind.PARAMETERS_CONVERTED:
                self._converted.add(model)

    def _register_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for model in [m for m in self._evaluating if any(id(p) in held for p in m.parameters())]:
            # A Trainer prepares so what it evaluates before it trains, and what transformers has distributed.
            self._evaluating.discard(model)
            self._session.mark_trainable(model)
            self._convert_model(model, fixed=False)
        self._optimizers.add(optimizer)
        if self._masters is not None:
            self._masters.register_optimizer(optimizer)
        for model in self._converted:
            upcast_state(optimizer, model.parameters())

    def _release(self, masters: MasterWeights) -> None:
        masters.release(restore=not self._in_ddp)
        if self._in_ddp and self._converted:
            self._session.note(
                EventKind.HALF_PARAMETERS,
                "parameters stay FP16 after detach, because DistributedDataParallel counts on it: to go on in FP32, convert "
                "the model and wrap it again.",
            )


def register_models(accelerator: Accelerator, session: AmpSession) -> None:
    """Lets all models, prepared or to be, follow the session's plan. On a CPU this makes "fp16" mean FP16."""
    on_cpu = _is_fp16_on_cpu(accelerator, session)
    context = ForwardContext(session.current_precision)
    half_outputs = not session.config.emulate or session.scaler.master_weights is not None
    if on_cpu:
        # With `native_amp` accelerate unscales before clipping; its own autocast is kept out, ours is entered by hooks.
        session.changes.set_attribute(accelerator, "native_amp", True)
        if session.config.emulate:
            session.changes.set_attribute(accelerator, "autocast_handler", AutocastKwargs(enabled=False))
    registered: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def register_model(prepared: nn.Module, is_trained: bool = True) -> None:
        model = accelerator.unwrap_model(prepared, keep_torch_compile=False)
        if model in registered:
            return
        registered.add(model)
        session.register_model(model, entry_point=prepared, is_trained=is_trained)
        if on_cpu:
            session.changes.on_undo(context.install(model))
            if half_outputs:
                handle = model.register_forward_hook(_outputs_to_fp32)
                session.changes.on_undo(handle.remove)
        else:
            session.follow_default(_changer_of_forward(weakref.ref(model), session))

    for prepared in prepared_models(accelerator):
        register_model(prepared)

    prepare_model = accelerator.prepare_model

    @functools.wraps(prepare_model)
    def prepare_and_register(
        model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> Any:
        if not evaluation_mode:  # before accelerate wraps what the former session has put into `forward`
            session.detach_previous_session(accelerator.unwrap_model(model, keep_torch_compile=False))
        native_amp = accelerator.native_amp
        accelerator.native_amp = native_amp and not on_cpu
        try:
            prepared = prepare_model(model, device_placement, evaluation_mode)
        finally:
            accelerator.native_amp = native_amp
        register_model(prepared, is_trained=not evaluation_mode)
        return prepared

    session.changes.set_attribute(accelerator, "prepare_model", prepare_and_register)


def _changer_of_forward(
    reference: weakref.ref[nn.Module], session: AmpSession
) -> Callable[[PrecisionMode], None]:
    """What makes a model follow a changed default: accelerate has bound its `forward` to the autocast asked for."""
    changes = PatchLog()

    def change(default: PrecisionMode) -> None:
        changes.undo()
        model = reference()
        if model is None or default is session.requested_mode:
            return
        plain = forward_before_autocast(model)

        @functools.wraps(plain)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            with session.autocast():
                output = plain(self, *args, **kwargs)
            return convert_outputs_to_fp32(lambda: output)()

        changes.set_attribute(model, "forward", MethodType(forward, model))

    return change


def patch_autocast(accelerator: Accelerator, session: AmpSession) -> None:
    """Makes `accelerator.autocast()` enter the plan's default where accelerate would enter another."""
    autocast = accelerator.autocast
    on_cpu = _is_fp16_on_cpu(accelerator, session)

    @functools.wraps(autocast)
    def autocast_of_plan(autocast_handler: AutocastKwargs | None = None) -> Any:
        is_wanted = autocast_handler is None or autocast_handler.enabled
        if is_wanted and (on_cpu or session.plan.default is not session.requested_mode):
            return session.autocast()
        return autocast(autocast_handler)

    session.changes.set_attribute(accelerator, "autocast", autocast_of_plan)


def _is_fp16_on_cpu(accelerator: Accelerator, session: AmpSession) -> bool:
    """Where accelerate builds neither scaler nor autocast, and runs FP32."""
    return not session.scaler.no_scaling and accelerator.device.type == "cpu"


def _outputs_to_fp32(module: nn.Module, arguments: Any, output: Any) -> Any:
    """As accelerate does on other devices."""
    return convert_outputs_to_fp32(lambda: output)()


_REDUCTION = "_hf_amp_reduction"


class GradientReduction:
    """How one DistributedDataParallel model averages its gradients over the ranks.

    Attributes:
        dtype: what they travel in; None for as they are, in which case the result is that of no hook at all.
    """

    def __init__(self) -> None:
        self.dtype: torch.dtype | None = None

    def average(self, bucket: Any) -> Any:
        """A communication hook: the mean of `bucket` over all ranks, as a future of its flat buffer.

        Each rank divides before it rounds, so that what travels and is summed is the mean, never the larger sum: its
        largest magnitude is the one that the headroom is taken from. A gradient beyond the range becomes inf, on all
        ranks alike, and so an overflow.
        """
        buffer: Tensor = bucket.buffer()
        buffer.div_(dist.get_world_size())
        sent = buffer if self.dtype is None else buffer.to(self.dtype)
        return (
            dist.all_reduce(sent, async_op=True).get_future().then(lambda done: buffer.copy_(done.value()[0]))
        )


def reduce_gradients_in_half(accelerator: Accelerator, session: AmpSession) -> None:
    """Makes DistributedDataParallel send gradients in `config.communication_precision`, if that is set.

    torch cannot take a communication hook off a model: after `detach` it stays, and averages as without it.

    Raises:
        ConfigError: FP16 in a run whose gradients are not scaled; or another communication hook is asked for.
        AttachError: models are prepared already.
    """
    precision = session.config.communication_precision
    if precision is None:
        return
    if precision is PrecisionMode.FP16 and session.scaler.no_scaling:
        raise ConfigError(
            f"communication_precision=FP16 with mixed_precision={accelerator.mixed_precision!r}: without loss scaling "
            "small gradients would vanish in FP16; use communication_precision=BF16, or mixed_precision='fp16'."
        )
    if accelerator.distributed_type is DistributedType.FSDP:
        raise ConfigError(
            f"communication_precision={precision.value} under FSDP, which has an option of its own for what it reduces "
            "gradients in: set the reduce_dtype of mixed_precision_policy of FullyShardedDataParallelPlugin instead."
        )
    handler = accelerator.ddp_handler
    if handler is not None and handler.comm_hook != DDPCommunicationHookType.NO:
        raise ConfigError(
            f"communication_precision={precision.value} and comm_hook={handler.comm_hook.value!r} of "
            "DistributedDataParallelKwargs are two communication hooks, and a model takes one: leave one of them out."
        )
    if accelerator.num_processes > 1 and prepared_models(accelerator):
        raise AttachError(
            f"communication_precision={precision.value} after accelerator.prepare(): accelerate keeps no hold of the "
            "DistributedDataParallel that it has put around a model; call hf_amp.attach before prepare."
        )
    dtype = NumberFormat.of(precision).dtype
    prepare_model = accelerator.prepare_model

    @functools.wraps(prepare_model)
    def prepare_and_reduce(*args: Any, **kwargs: Any) -> Any:
        model = prepare_model(*args, **kwargs)
        _reduce_in(model, dtype, session)
        return model

    session.changes.set_attribute(accelerator, "prepare_model", prepare_and_reduce)


def _reduce_in(model: nn.Module, dtype: torch.dtype, session: AmpSession) -> None:
    if not isinstance(model, DistributedDataParallel):
        return
    reduction: GradientReduction | None = getattr(model, _REDUCTION, None)
    if reduction is None:
        reduction = GradientReduction()
        model.register_comm_hook(reduction, lambda reduction, bucket: reduction.average(bucket))
        setattr(model, _REDUCTION, reduction)
    session.changes.set_attribute(reduction, "dtype", dtype)


def refuse_uneven_inputs(accelerator: Accelerator, session: AmpSession) -> None:
    """Makes `join_uneven_inputs` a clear error where it would let ranks run out of batches one by one.

    A rank that has left the loop takes no part in the agreement on each step, for which the others would wait.
    """
    join_uneven_inputs = accelerator.join_uneven_inputs

    @functools.wraps(join_uneven_inputs)
    def join_even_inputs(joinables: Any, even_batches: bool | None = None) -> AbstractContextManager[None]:
        even = accelerator.even_batches if even_batches is None else even_batches
        if accelerator.multi_device and not even:
            raise AttachError(
                "join_uneven_inputs without even_batches: hf_amp's ranks agree on every step, so that all of them need "
                "the same number of batches; use even_batches=True (accelerate's default), or detach hf_amp."
            )
        context: AbstractContextManager[None] = join_uneven_inputs(joinables, even_batches)
        return context

    session.changes.set_attribute(accelerator, "join_uneven_inputs", join_even_inputs)


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
    what = session.describe() + limits if config.enabled else "disabled by the config"
    if not config.enabled:
        session.described_as = "without hf_amp, which the config disables"
    session.note(
        EventKind.ATTACHED,
        f"hf_amp is attached: {what}.",
        device=str(accelerator.device),
        precision=session.requested_mode.value,
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
        config, limits = float8.finite_check_only(config, float8_runner), float8.limits(float8_runner)
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
    session.throughput.devices = (device,)
    session.folds_clipping = config.fold_clipping is True
    if float8_runner is not None:
        session.described_as = float8.describe(float8_runner, session.hardware)
        session.disable_replay()
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
    optimizers = PreparedOptimizers(accelerator, session)
    merge_metrics_into_logs(accelerator, session)
    keep_state_in_checkpoints(accelerator, session, optimizers)
    sharded = accelerator.distributed_type is DistributedType.FSDP
    if not session.scaler.no_scaling:
        _scale_losses(accelerator, session)
        if not sharded:  # a rank knows the norm of its own shards only
            _fold_clipping(accelerator, session, optimizers)
    else:
        _show_losses(accelerator, session)
        if session.scaler.master_weights is not None:
            _widen_gradients_before_clipping(accelerator, session, optimizers)
    if sharded:
        return
    register_models(accelerator, session)
    patch_autocast(accelerator, session)
    ParameterConversion(accelerator, session)


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


def _fold_clipping(accelerator: Accelerator, session: AmpSession, optimizers: PreparedOptimizers) -> None:
    """Lets `accelerator.clip_grad_norm_` fold into the optimizer step where the session says that nobody looks."""
    clip_grad_norm_ = accelerator.clip_grad_norm_

    @functools.wraps(clip_grad_norm_)
    def clip_or_fold(parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        if session.folds_clipping and norm_type == 2 and len(optimizers.registered) == 1:
            (optimizer,) = optimizers.registered
            inner = optimizer.optimizer
            if _holds_exactly(inner, parameters) and not has_step_hooks(inner, besides=RefuseScaledStep):
                return session.scaler.clip_grad_norm_(inner, max_norm)
        return clip_grad_norm_(parameters, max_norm, norm_type)

    session.changes.set_attribute(accelerator, "clip_grad_norm_", clip_or_fold)


def _widen_gradients_before_clipping(
    accelerator: Accelerator, session: AmpSession, optimizers: PreparedOptimizers
) -> None:
    """Lets clipping see the FP32 gradients that master weights are moved by, also where no loss is scaled."""
    unscale_gradients = accelerator.unscale_gradients

    @functools.wraps(unscale_gradients)
    def widen(optimizer: Any = None) -> None:
        for each in optimizers.registered:
            session.scaler.unscale_(each.optimizer)
        unscale_gradients(optimizer)

    session.changes.set_attribute(accelerator, "unscale_gradients", widen)


def _holds_exactly(optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor]) -> bool:
    """Whether the gradients of `parameters` are those that `optimizer` will apply, all of them and no other."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
    return held == {id(p) for p in parameters if p.grad is not None}
