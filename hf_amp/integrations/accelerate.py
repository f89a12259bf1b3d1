"""`attach`: hf_amp on an `accelerate.Accelerator`, before or after `prepare`.

All that attach changes on the Accelerator stands in one list, `AttachedAccelerator.replacements`; `detach` undoes it in reverse.
What it changes on optimizers is in `PreparedOptimizers`, on checkpoints in `checkpoint.py`, on logs in `trackers.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import MethodType
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import AutocastKwargs, DDPCommunicationHookType, DistributedType, convert_outputs_to_fp32
from accelerate.utils.ao import filter_linear_layers, find_first_last_linear_layers
from accelerate.utils.dataclasses import FP8BackendType
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from hf_amp.config import LOOP_OPTIONS, MixedPrecisionConfig
from hf_amp.device import probe
from hf_amp.errors import AttachError, ConfigError
from hf_amp.events import EventKind
from hf_amp.fallback.module_precision import ForwardContext, names_like
from hf_amp.fallback.plan import common_to_ranks
from hf_amp.integrations import deepspeed
from hf_amp.integrations._compat import (
    WHOLE,
    forget_skip,
    forward_before_autocast,
    gathers_bf16,
    gathers_whole_by_default,
    has_step_hooks,
    in_its_ddp,
    prepared_models,
    prepared_optimizers,
    replace_scaler,
    steps_in_backward,
)
from hf_amp.integrations.checkpoint import loading_from_any_precision, saving_whole
from hf_amp.integrations.rewind import go_back_in_loop, refuse_what_cannot_go_back
from hf_amp.integrations.trackers import logging_with_metrics
from hf_amp.patch_log import PatchLog, UnpickledHook, takes_hooks
from hf_amp.precision import PrecisionMode
from hf_amp.scaling.left_out import join_left_out_steps
from hf_amp.scaling.master_weights import convert_parameters, upcast_state
from hf_amp.scaling.optimizer_step import RefuseScaledStep, install_refusal
from hf_amp.scaling.scaler import AdvancedGradScaler
from hf_amp.session import AmpSession
from hf_amp.statistics import held_by

_SESSION = "_hf_amp_session"
_COMPRESSION = "_hf_amp_compression"
_MODES = {
    "fp16": PrecisionMode.MIXED,
    "bf16": PrecisionMode.BF16,
    "fp8": PrecisionMode.BF16,  # what modules run in that are not converted to FP8
    "no": PrecisionMode.FP32,
}
_SCALING_OPTIONS = ("scaling_strategy", "init_scale", "growth_interval", "growth_factor", "backoff_factor")
_SUPPORTED = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.FSDP,
    DistributedType.DEEPSPEED,
)


def attach(accelerator: Accelerator, config: Any = None, **options: Any) -> AmpSession:
    """Puts hf_amp to work on `accelerator` and on everything it has prepared or will prepare.

    Args:
        accelerator: with `mixed_precision` "fp16", "bf16", "fp8" or "no", which is followed; one process, or several with
            DistributedDataParallel or FSDP. Under FSDP1 modules do not fall back, and causes are looked for in weights only.
            FSDP2 is as DDP; attached before `prepare`, it gathers parameters in FP32 under "fp16" and for `fp32_modules`, and
            autocast casts them, unless the plugin has a `mixed_precision_policy` of yours. FP8, which another library runs, is checked
            as BF16 is, without fallback; layers that torchao's does damage in are named once, and `fp32_modules` stay out of its
            conversion, where attach comes before prepare. DeepSpeed, which scales and skips by itself, is only observed.
        config: a `MixedPrecisionConfig`, a mapping of options, or the path of a YAML or JSON file; None for the defaults.
        options: options as keywords, in place of a config.

    Returns:
        The session. `session.detach()`, or leaving it as a context manager, gives everything its former state.

    Raises:
        ConfigError: an option is wrong, contradicts the accelerator, or cannot be followed there.
        AttachError: the accelerator runs something that hf_amp does not support, or has a session already; or a prepared
            model has half-precision parameters that `half_parameters` does not allow.
    """
    _check_supported(accelerator)
    config = MixedPrecisionConfig.from_any(config, options, "hf_amp.attach")
    config.refuse(
        LOOP_OPTIONS,
        "only the trainers and the manager of hf_amp follow it; set what Trainer or Accelerator has for it",
    )
    refuse_what_cannot_go_back(accelerator, config)
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        session, limits = deepspeed.observe(accelerator, config), deepspeed.LIMITS
        if config.enabled:
            session.patches.set_attribute(accelerator, _SESSION, session)
    else:
        session, limits = _decide_steps(accelerator, config)
    given = [name for name in _SCALING_OPTIONS if getattr(config, name) != getattr(MixedPrecisionConfig(), name)]
    if given and session.requested_mode is PrecisionMode.FP32 and config.enabled:
        session.note(EventKind.SETUP, f"{', '.join(given)}: nothing is scaled in FP32, only with fp16=True.")
    what = session.describe() + limits if config.enabled else "disabled by the config"
    session.note(
        EventKind.ATTACHED,
        f"hf_amp is attached: {what}.",
        device=str(accelerator.device),
        precision=session.requested_mode.value,
        strategy=config.scaling_strategy.value,
    )
    return session


def session_of(accelerator: Any) -> AmpSession | None:
    """The session that is attached to `accelerator`; None where there is none."""
    return cast("AmpSession | None", getattr(accelerator, _SESSION, None))


def _decide_steps(accelerator: Accelerator, config: MixedPrecisionConfig) -> tuple[AmpSession, str]:
    """A session that decides which optimizer steps are applied, and what else it leaves alone, for people."""
    limits = ""
    if accelerator.distributed_type is DistributedType.FSDP:
        config.refuse(["precision_schedule"], "under FSDP the run stays in the format that parameters are gathered in")
    if accelerator.distributed_type is DistributedType.FSDP and config.enabled:
        if not accelerator.is_fsdp2:
            limits = "; under FSDP it scales and skips, and modules do not fall back"
        elif gathers_bf16(accelerator) and not gathers_whole_by_default(accelerator, bool(config.fp32_modules)):
            limits = "; FSDP rounds parameters to BF16 as it gathers them, so modules do not fall back, but with fp32_modules"
        if limits:
            config.refuse(["fp32_modules"], "under FSDP modules run as its mixed_precision_policy says")
            config = dataclasses.replace(config, automatic_fallback=False)
    runner = _float8_runner(accelerator)
    if runner is not None:  # which owns the precision of the modules
        options = ["half_parameters", "communication_precision", "precision_schedule"]
        options += ["precision_mode"] * (config.precision_mode is not PrecisionMode.BF16)  # which is around it
        options += ["fp32_modules"] * (accelerator.ao_recipe_handler is None)
        config.refuse(options, f"FP8 is run by {runner}, and hf_amp only observes and checks it")
        config = dataclasses.replace(config, automatic_fallback=False)
        limits = f"; FP8 is run by {runner}: hf_amp observes and checks, modules do not fall back; hf_amp.choose_precision names those to leave out"
    mode, device = _mode_of(accelerator, config), accelerator.device
    scaler = AdvancedGradScaler(dataclasses.replace(config, precision_mode=mode), device)
    scaler.ranks_agree = scaler.ranks_agree or accelerator.num_processes > 1
    hardware = common_to_ranks(probe(device), device)
    # accelerate runs everything that is not FP8 under BF16 autocast.
    described = None if runner is None else f"FP8 by {runner} with BF16 around it on {hardware.name}"
    session = AmpSession(config, scaler, mode, hardware, described)
    session.folds_clipping = config.fold_clipping is True
    if runner is not None:
        session.disable_replay()
    if config.enabled:
        try:
            AttachedAccelerator(accelerator, session)
        except Exception:
            session.patches.undo()  # an attach that fails has changed nothing
            raise
    return session, limits


def _check_supported(accelerator: Accelerator) -> None:
    if not isinstance(accelerator, Accelerator):
        raise AttachError(
            f"hf_amp.attach got {type(accelerator).__name__}: pass an accelerate.Accelerator. For a Trainer add "
            "hf_amp.MixedPrecisionCallback() to its callbacks instead; in a loop without accelerate use "
            "hf_amp.AmpSession.for_model(model, optimizer)."
        )
    former = session_of(accelerator)
    if former is not None and former.scaler.decided_steps and not prepared_optimizers(accelerator):
        former.detach()  # it has trained, and `free_memory()` has released its objects
    elif former is not None:
        raise AttachError("this Accelerator has an hf_amp session already: use that one, or call its detach() first.")
    if accelerator.distributed_type not in _SUPPORTED:
        raise AttachError(
            f"hf_amp does not support {accelerator.distributed_type.value}: Megatron-LM, for one, scales losses and skips "
            "steps by itself, and two scalers on one loss are wrong. Use one process, or several with "
            "DistributedDataParallel (MULTI_GPU, MULTI_CPU), FSDP or DeepSpeed, or leave attach out."
        )


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
            f"TrainingArguments), which is {mode.value}: leave precision_mode out (or the plan that sets it), or make the two agree."
        )
    return mode


class AttachedAccelerator:
    """What an Accelerator does in place of its own methods while a session is attached to it.

    Args:
        accelerator: with what it has prepared already, which joins the session.
        session: whose patches keep what is to be undone.

    Raises:
        ConfigError: `communication_precision` cannot be followed there.
        AttachError: `half_parameters` forbids what a prepared model has, or it cannot be converted any more.
    """

    def __init__(self, accelerator: Accelerator, session: AmpSession) -> None:
        self._accelerator, self._session = accelerator, session
        self._masters = session.scaler.master_weights
        self._fsdp2 = accelerator.is_fsdp2
        self._sharded = accelerator.distributed_type is DistributedType.FSDP and not self._fsdp2
        if self._fsdp2 and gathers_whole_by_default(accelerator, bool(session.config.fp32_modules)):
            session.patches.set_attribute(accelerator.state.fsdp_plugin, "mixed_precision_policy", WHOLE)
        # On a CPU accelerate builds neither scaler nor autocast for "fp16", and runs FP32.
        self._fp16_on_cpu = not session.scaler.no_scaling and accelerator.device.type == "cpu"
        # Inside DDP a change of dtype would cut parameters off from the reduction of their gradients. accelerate lists
        # models as they were before it wrapped them.
        self._in_ddp = accelerator.num_processes > 1
        self._compression = _compression_hook(accelerator, session)
        self._context = ForwardContext(session.current_precision)
        self._registered: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._converted: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._upcast: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._evaluating: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._known_optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        session.patches.set_attribute(accelerator, _SESSION, session)
        self._leaves_out_of_fp8 = bool(accelerator.mixed_precision == "fp8" and session.config.fp32_modules)
        if self._leaves_out_of_fp8 and prepared_models(accelerator):
            raise AttachError(
                "fp32_modules after accelerator.prepare(): the model is converted to FP8 already; call hf_amp.attach before prepare."
            )
        self._optimizers = PreparedOptimizers(accelerator, session)
        if accelerator.distributed_type is DistributedType.FSDP:
            session.without_scaler = self._optimizers.without_scaler
        if session.config.on_stalled == "rewind":
            session.on_fault = functools.partial(go_back_in_loop, accelerator, session)
        self._stock: dict[str, Any] = {}
        for name, replacement in self.replacements().items():
            self._stock[name] = former = getattr(accelerator, name)
            if callable(former) and callable(replacement) and name != "scaler":
                replacement = functools.wraps(former)(functools.partial(replacement))
            session.patches.set_attribute(accelerator, name, replacement)
        self._join_prepared()

    def replacements(self) -> dict[str, Any]:
        """Attribute of the Accelerator → what it is while hf_amp is attached: all that attach changes there, in order."""
        accelerator, session, optimizers = self._accelerator, self._session, self._optimizers
        scales = not session.scaler.no_scaling
        changed: dict[str, Any] = {
            "prepare_optimizer": self.prepare_optimizer,
            "join_uneven_inputs": self.join_uneven_inputs,
            "log": logging_with_metrics(accelerator, session),
            "save_state": saving_whole(accelerator, session, optimizers.without_scaler),
            "load_state": loading_from_any_precision(accelerator, session, optimizers.without_scaler),
        }
        if scales:
            changed["scaler"] = self._scaler_that_goes_on()
        else:
            changed["backward"] = self.backward
        if not self._sharded:  # a rank knows the norm of its own shards only
            changed["clip_grad_norm_"] = self.clip_grad_norm_
        if not scales and self._masters is not None:
            changed["unscale_gradients"] = self.unscale_gradients
        if self._fsdp2:
            changed["prepare"] = self.prepare_sharded
        if self._leaves_out_of_fp8:
            changed["prepare"] = self.prepare_in_part
        if not self._sharded:
            changed |= {"prepare_model": self.prepare_model, "autocast": self.autocast}
            if self._fp16_on_cpu:
                # With `native_amp` accelerate unscales before clipping; its own autocast is kept out, ours is entered by hooks.
                changed["native_amp"] = True
                if session.config.emulate:
                    changed["autocast_handler"] = AutocastKwargs(enabled=False)
        return changed

    def _scaler_that_goes_on(self) -> AdvancedGradScaler:
        """The session's scaler, which goes on where a used stock one was."""
        accelerator, scaler = self._accelerator, self._session.scaler
        stock = accelerator.scaler
        if stock is None and accelerator.scaler_handler is not None:  # accelerate makes none on a CPU
            stock = torch.amp.GradScaler(accelerator.device.type, **accelerator.scaler_handler.to_kwargs())
        if stock is not None and stock.is_enabled():
            used = stock.state_dict()
            if used != type(stock)(accelerator.device.type).state_dict():
                scaler.load_state_dict(used)  # resumed, or made with GradScalerKwargs
        return scaler

    def backward(self, loss: Any, **kwargs: Any) -> None:
        """Lets the finite check see every loss, which accelerate shows to none but a scaler. No GPU-CPU sync."""
        self._stock["backward"](self._session.scaler.scale(loss), **kwargs)

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        """Clips by the norm that the finite check takes; fused into the optimizer step where nobody looks in between."""
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        scaler, registered = self._session.scaler, list(self._optimizers.registered)
        if norm_type == 2 and len(registered) == 1 and self._masters is None:
            inner = registered[0].optimizer
            # The norm is that of the gradients which the optimizer will apply, of all of them and of no other.
            held = {id(p) for group in inner.param_groups for p in group["params"] if p.grad is not None}
            if held == {id(p) for p in parameters if p.grad is not None}:
                if self._session.folds_clipping and not (
                    scaler.no_scaling or has_step_hooks(inner, besides=RefuseScaledStep)
                ):
                    return scaler.clip_grad_norm_(inner, max_norm)
                if all(
                    p.grad is None or p.grad.dtype == torch.float32 for p in parameters
                ):  # torch's norm of others is rounded
                    return scaler.clip_grad_norm_(inner, max_norm, in_place=True, order=parameters)
        return self._stock["clip_grad_norm_"](parameters, max_norm, norm_type)

    def unscale_gradients(self, optimizer: Any = None) -> None:
        """Lets clipping see the FP32 gradients that master weights are moved by, also where no loss is scaled."""
        for each in self._optimizers.registered:
            self._session.scaler.unscale_(each.optimizer)
        self._stock["unscale_gradients"](optimizer)

    def join_uneven_inputs(self, joinables: Any, even_batches: bool | None = None) -> AbstractContextManager[None]:
        """An error where it would let ranks run out of batches one by one: the others would wait for their verdict."""
        accelerator = self._accelerator
        if accelerator.multi_device and not (accelerator.even_batches if even_batches is None else even_batches):
            raise AttachError(
                "join_uneven_inputs without even_batches: hf_amp's ranks agree on every step, so that all of them need "
                "the same number of batches; use even_batches=True (accelerate's default), or detach hf_amp."
            )
        return self._join_evenly(joinables, even_batches)

    @contextmanager
    def _join_evenly(self, joinables: Any, even_batches: bool | None) -> Iterator[None]:
        """accelerate enters torch's Join, switched off, which asks the models for their hooks all the same."""
        allowed = PatchLog()
        for each in joinables:
            allowed.set_attribute(each, "join_hook", functools.partial(type(each).join_hook, each))
        with self._stock["join_uneven_inputs"](joinables, even_batches):
            allowed.undo()
            yield

    def prepare_in_part(self, *args: Any, **kwargs: Any) -> Any:
        """Prepares with the modules of `fp32_modules` left out of torchao's conversion to FP8, besides what its recipe leaves out."""
        recipe, patterns = self._accelerator.ao_recipe_handler, self._session.config.fp32_modules
        wanted, left_out = recipe.module_filter_func, set()
        for model in (each for each in args if isinstance(each, nn.Module)):
            modules = dict(model.named_modules())
            held = [name for pattern in patterns for name in names_like(pattern, modules.items())]
            left_out |= {inner for name in held for inner in modules[name].modules()}
            if wanted is None:  # then accelerate leaves out the first and the last, and so with our filter in its place
                left_out |= {modules[name] for name in find_first_last_linear_layers(model) if name is not None}

        def converts(module: nn.Module, name: str) -> bool:
            others = functools.partial(filter_linear_layers, layers_to_filter=[]) if wanted is None else wanted
            return module not in left_out and bool(others(module, name))

        patches = PatchLog()
        patches.set_attribute(recipe, "module_filter_func", converts)
        try:
            prepare = self.prepare_sharded if self._fsdp2 else self._stock["prepare"]
            return prepare(*args, **kwargs)
        finally:
            patches.undo()

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> Any:
        """Prepares a model that follows the session's plan. On a CPU this makes "fp16" mean FP16."""
        accelerator = self._accelerator
        inner = accelerator.unwrap_model(model, keep_torch_compile=False)
        if evaluation_mode:
            self._evaluating.add(inner)
        else:
            self._convert_model(inner, fixed=isinstance(model, DistributedDataParallel))
            # before accelerate wraps what the former session has put into `forward`
            self._session.detach_previous_session(inner)
        native_amp = accelerator.native_amp
        accelerator.native_amp = native_amp and not self._fp16_on_cpu
        try:
            prepared = self._stock["prepare_model"](model, device_placement, evaluation_mode)
        finally:
            accelerator.native_amp = native_amp
        if self._compression is not None:
            _compress(prepared, self._compression, self._session.patches)
        self._register_model(prepared, inner, is_trained=not evaluation_mode)
        return prepared

    def prepare_sharded(self, *args: Any, **kwargs: Any) -> Any:
        """Prepares a model that FSDP2 shards with the optimizers that hold its shards from then on."""
        accelerator, is_known = self._accelerator, set(map(id, prepared_models(self._accelerator)))
        prepared = self._stock["prepare"](*args, **kwargs)
        for model in prepared_models(accelerator):
            if id(model) not in is_known:
                self._register_model(model, accelerator.unwrap_model(model, keep_torch_compile=False))
        for optimizer in prepared_optimizers(accelerator):
            self._register_optimizer(optimizer.optimizer)
        return prepared

    def prepare_optimizer(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        """Prepares an optimizer whose steps the session's scaler decides."""
        if not self._sharded and not self._fsdp2:
            # Before, because preparing loads the optimizer's state, which rounds it to what its parameters are.
            self._register_optimizer(optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer)
        prepared = self._stock["prepare_optimizer"](optimizer, *args, **kwargs)
        self._optimizers.register(prepared)
        return prepared

    def autocast(self, autocast_handler: AutocastKwargs | None = None) -> Any:
        """Enters the plan's default where accelerate would enter another precision."""
        session = self._session
        if autocast_handler is None or autocast_handler.enabled:
            entered = session.autocast()  # which notes that the loop does
            if self._fp16_on_cpu or session.plan.default is not session.requested_mode:
                return entered
        return self._stock["autocast"](autocast_handler)

    def _join_prepared(self) -> None:
        """What was prepared before attach joins the session."""
        if self._sharded:
            return
        if self._masters is not None:
            self._session.patches.on_undo(self._release_masters)
        unwrap = functools.partial(self._accelerator.unwrap_model, keep_torch_compile=False)
        for prepared in prepared_models(self._accelerator):
            self._register_model(in_its_ddp(prepared) if self._in_ddp else prepared, unwrap(prepared))
        for optimizer in prepared_optimizers(self._accelerator):
            self._register_optimizer(optimizer.optimizer)
        for model in prepared_models(self._accelerator):
            self._convert_model(unwrap(model), fixed=self._in_ddp)

    def _register_model(self, prepared: nn.Module, model: nn.Module, is_trained: bool = True) -> None:
        session = self._session
        if model in self._registered:
            return
        self._registered.add(model)
        # accelerate enters no autocast where FSDP2 shards.
        enters = self._fp16_on_cpu or (self._fsdp2 and is_trained and not gathers_bf16(self._accelerator))
        if enters:
            session.patches.on_undo(self._context.install(model, everywhere=self._fp16_on_cpu))
        if enters and takes_hooks(model):  # before the session, which keeps what these outputs are given
            session.patches.on_undo(model.register_forward_hook(_OutputsToFloat32()).remove)
        session.register_model(model, entry_point=prepared, is_trained=is_trained)
        if is_trained:
            session.patches.on_undo(join_left_out_steps(session.scaler, prepared, session.note))
        if not enters:
            change = _changer_of_forward(weakref.ref(model), session)
            session.follow_default(change)
            change(session.plan.default)

    def _convert_model(self, model: nn.Module, fixed: bool) -> None:
        session = self._session
        if model in self._converted:
            return
        optimizers, mode = self._known_optimizers, session.plan.default
        event = convert_parameters(model, session.config, mode, optimizers, self._masters, fixed)
        self._converted.add(model)
        session.record(event)
        if event is not None and event.kind is EventKind.PARAMETERS_CONVERTED:
            self._upcast.add(model)

    def _register_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        held = {id(p) for p in held_by(optimizer)}
        for model in [m for m in self._evaluating if any(id(p) in held for p in m.parameters())]:
            # A Trainer prepares so what it evaluates before it trains, and what transformers has distributed.
            self._evaluating.discard(model)
            self._session.mark_trainable(model)
            self._convert_model(model, fixed=False)
        self._known_optimizers.add(optimizer)
        if self._masters is not None:
            self._masters.register_optimizer(optimizer)
        for model in self._upcast:
            upcast_state(optimizer, model.parameters())

    def _release_masters(self) -> None:
        if self._masters is not None:
            self._masters.release(restore=not self._in_ddp)
        if self._in_ddp and self._upcast:
            self._session.note(
                EventKind.HALF_PARAMETERS,
                "parameters stay FP16 after detach, because DistributedDataParallel counts on it: to go on in FP32, convert "
                "the model and wrap it again.",
            )


def _changer_of_forward(reference: weakref.ref[nn.Module], session: AmpSession) -> Callable[[PrecisionMode], None]:
    """What makes a model follow a changed default: accelerate has bound its `forward` to the autocast asked for."""
    patches = PatchLog()

    def change(default: PrecisionMode) -> None:
        patches.undo()
        model = reference()
        if model is None or default is session.requested_mode:
            return
        plain = forward_before_autocast(model)

        @functools.wraps(plain)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            with session.current_precision():
                output = plain(self, *args, **kwargs)
            return convert_outputs_to_fp32(lambda: output)()

        patches.set_attribute(model, "forward", MethodType(forward, model))

    return change


class _OutputsToFloat32(UnpickledHook):
    """As accelerate does on other devices."""

    def __call__(self, module: nn.Module, arguments: Any, output: Any) -> Any:
        return convert_outputs_to_fp32(lambda: output)()

    def __deepcopy__(self, memo: dict[int, Any]) -> _OutputsToFloat32:
        return self


class PreparedOptimizers:
    """The optimizers whose steps the session's scaler decides: all of them, prepared or to be. Keeps none alive.

    Args:
        accelerator: still with its own scaler, which the optimizers get back when the session is detached.
        session: whose scaler they get.

    Attributes:
        registered: the prepared optimizers.
    """

    def __init__(self, accelerator: Accelerator, session: AmpSession) -> None:
        self.registered: weakref.WeakSet[AcceleratedOptimizer] = weakref.WeakSet()
        self._session, self._scaler = session, session.scaler
        self._former_scaler = accelerator.scaler
        self._on_undo = session.patches.on_undo
        # what a learning-rate scheduler has put in the place of an optimizer's own `step`, None for that one; and ours
        self._steps: weakref.WeakKeyDictionary[AcceleratedOptimizer, tuple[Any, Any]] = weakref.WeakKeyDictionary()
        session.patches.on_undo(self._give_back)
        for prepared in prepared_optimizers(accelerator):
            self.register(prepared)

    @contextmanager
    def without_scaler(self) -> Iterator[None]:
        """The optimizers as they are without a scaler, for steps that are not training's.

        Saving or loading the sharded state of an optimizer steps it on gradients of zero (accelerate#4289).
        """
        for optimizer in self.registered:
            replace_scaler(optimizer, None)
        try:
            yield
        finally:
            for optimizer in self.registered:
                replace_scaler(optimizer, self._scaler)

    def register(self, optimizer: AcceleratedOptimizer) -> None:
        """Has the session's scaler decide `optimizer`'s steps. Harmless when called again."""
        if optimizer in self.registered:
            return
        if steps_in_backward(optimizer.optimizer):
            raise AttachError(
                f"{type(optimizer.optimizer).__name__} takes its steps inside of backward, where nothing can look at the "
                "gradients first: hf_amp can neither scale, skip nor count them. Take an optimizer that steps after backward "
                "(in a Trainer, optim='galore_adamw' for 'galore_adamw_layerwise'), or leave hf_amp out."
            )
        self.registered.add(optimizer)
        self._scaler.watch(optimizer.optimizer)
        if not self._scaler.no_scaling:
            self._on_undo(install_refusal(optimizer.optimizer, self._scaler.is_waiting))
        if optimizer.scaler is not self._scaler:
            replace_scaler(optimizer, self._scaler)
        former = vars(optimizer).get("step")
        ours = _step_reporting_skips(former, self._session)
        optimizer.step = MethodType(ours, optimizer)
        self._steps[optimizer] = (former, ours)
        vars(optimizer)["__getstate__"] = functools.partial(self._state_without_session, weakref.ref(optimizer))

    def _state_without_session(self, reference: weakref.ref[AcceleratedOptimizer]) -> dict[str, Any]:
        """What copies and pickles of a prepared optimizer are made from."""
        optimizer = cast(AcceleratedOptimizer, reference())
        state = {**AcceleratedOptimizer.__getstate__(optimizer), "scaler": self._former_scaler}
        del state["__getstate__"]
        former, ours = self._steps[optimizer]
        if getattr(state["step"], "__func__", None) is ours:  # a learning-rate scheduler may have wrapped it since
            del state["step"]
            state |= {} if former is None else {"step": former}
        return state

    def _give_back(self) -> None:
        for optimizer in self.registered:
            del vars(optimizer)["__getstate__"]
            replace_scaler(optimizer, self._former_scaler)
            forget_skip(optimizer)
            former, ours = self._steps[optimizer]
            if getattr(vars(optimizer)["step"], "__func__", None) is not ours:
                continue  # a learning-rate scheduler has wrapped it since
            del optimizer.step
            if former is not None:
                optimizer.step = former


def _step_reporting_skips(former: Callable[..., Any] | None, session: AmpSession) -> Callable[..., Any]:
    """A `step` for a prepared optimizer, for which a micro-step that ends no accumulation window is not a skipped one, and one
    after which the run has gone back is.

    Upstream keeps the verdict of the last window until the next one ends (accelerate#2828).
    """

    def step(optimizer: AcceleratedOptimizer, *args: Any, **kwargs: Any) -> Any:
        if not optimizer.gradient_state.sync_gradients:
            forget_skip(optimizer)
        result = type(optimizer).step(optimizer, *args, **kwargs) if former is None else former(*args, **kwargs)
        scaler = optimizer.scaler  # None while a checkpoint of shards is written
        newest = scaler and scaler.last_outcome  # the optimizer was called in any case, where it skips by itself
        syncs = optimizer.gradient_state.sync_gradients
        if newest and not newest.applied and newest.attempt == scaler.decided_steps and syncs:
            forget_skip(optimizer, was_skipped=True)
        if session.rewinder.fault and session.on_fault is not None and session.on_fault():
            forget_skip(optimizer, was_skipped=True)
        return result

    return step


@dataclasses.dataclass
class _Compression:
    """State of a DistributedDataParallel's communication hook, which torch cannot take off again."""

    hook: Callable[..., Any] = default_hooks.allreduce_hook
    """torch's; after `detach` this one, which averages gradients as they are."""


def _compress(model: Any, hook: Callable[..., Any], patches: PatchLog) -> None:
    """Makes `model`, where it is a DistributedDataParallel, average its gradients by `hook` until `detach`."""
    if not isinstance(model, DistributedDataParallel):
        return
    state: _Compression | None = getattr(model, _COMPRESSION, None)
    if state is None:
        state = _Compression()
        model.register_comm_hook(state, lambda state, bucket: state.hook(None, bucket))
        setattr(model, _COMPRESSION, state)
    patches.set_attribute(state, "hook", hook)


def _compression_hook(accelerator: Accelerator, session: AmpSession) -> Callable[..., Any] | None:
    """torch's hook for `config.communication_precision`; None where that is not set.

    Raises:
        ConfigError: FP16 in a run whose gradients are not scaled; or another communication hook is asked for.
        AttachError: models are prepared already.
    """
    precision = session.config.communication_precision
    if precision is None:
        return None
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
    fp16 = precision is PrecisionMode.FP16
    return cast("Callable[..., Any]", default_hooks.fp16_compress_hook if fp16 else default_hooks.bf16_compress_hook)


_FLOAT8_RUNNERS = {FP8BackendType.AO: "torchao", FP8BackendType.TE: "TransformerEngine"}


def _float8_runner(accelerator: Accelerator) -> str | None:
    """The library that runs FP8 on `accelerator`; None where nothing runs in FP8.

    Raises:
        AttachError: it is one that hf_amp does not know.
    """
    if accelerator.mixed_precision != "fp8":
        return None
    if accelerator.fp8_backend not in _FLOAT8_RUNNERS:
        raise AttachError(
            f"hf_amp does not support FP8 by {accelerator.fp8_backend.value}, which scales by itself: use AORecipeKwargs "
            "(torchao) or TERecipeKwargs (TransformerEngine) in kwargs_handlers, or leave attach out."
        )
    return _FLOAT8_RUNNERS[accelerator.fp8_backend]
