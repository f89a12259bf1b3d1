"""The models of an Accelerator, prepared or to be: their forward passes follow the session's plan."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any

from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, convert_outputs_to_fp32
from torch import nn

from hf_amp.forward_context import ForwardContext
from hf_amp.integrations.upstream import forward_before_autocast, prepared_models
from hf_amp.precision import PrecisionMode
from hf_amp.reversible import ReversibleChanges
from hf_amp.session import AmpSession


def adopt_models(accelerator: Accelerator, session: AmpSession) -> None:
    """Lets all models, prepared or to be, follow the session's plan. On a CPU this makes "fp16" mean FP16."""
    on_cpu = _is_fp16_on_cpu(accelerator, session)
    context = ForwardContext(session.current_precision)
    half_outputs = not session.config.emulate or session.scaler.master_weights is not None
    if on_cpu:
        # With `native_amp` accelerate unscales before clipping; its own autocast is kept out, ours is entered by hooks.
        session.changes.set_attribute(accelerator, "native_amp", True)
        if session.config.emulate:
            session.changes.set_attribute(accelerator, "autocast_handler", AutocastKwargs(enabled=False))
    adopted: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def adopt(prepared: nn.Module, is_trained: bool = True) -> None:
        model = accelerator.unwrap_model(prepared, keep_torch_compile=False)
        if model in adopted:
            return
        adopted.add(model)
        session.adopt(model, entry_point=prepared, is_trained=is_trained)
        if on_cpu:
            session.changes.call_on_undo(context.install(model))
            if half_outputs:
                handle = model.register_forward_hook(_outputs_to_fp32)
                session.changes.call_on_undo(handle.remove)
        else:
            session.follow_default(_changer_of_forward(weakref.ref(model), session))

    for prepared in prepared_models(accelerator):
        adopt(prepared)

    prepare_model = accelerator.prepare_model

    @functools.wraps(prepare_model)
    def prepare_and_adopt(
        model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> Any:
        if not evaluation_mode:  # before accelerate wraps what the former session has put into `forward`
            session.take_over(accelerator.unwrap_model(model, keep_torch_compile=False))
        native_amp = accelerator.native_amp
        accelerator.native_amp = native_amp and not on_cpu
        try:
            prepared = prepare_model(model, device_placement, evaluation_mode)
        finally:
            accelerator.native_amp = native_amp
        adopt(prepared, is_trained=not evaluation_mode)
        return prepared

    session.changes.set_attribute(accelerator, "prepare_model", prepare_and_adopt)


def _changer_of_forward(
    reference: weakref.ref[nn.Module], session: AmpSession
) -> Callable[[PrecisionMode], None]:
    """What makes a model follow a changed default: accelerate has bound its `forward` to the autocast asked for."""
    changes = ReversibleChanges()

    def change(default: PrecisionMode) -> None:
        changes.undo()
        model = reference()
        if model is None or default is session.asked_for:
            return
        plain = forward_before_autocast(model)

        @functools.wraps(plain)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            with session.autocast():
                output = plain(self, *args, **kwargs)
            return convert_outputs_to_fp32(lambda: output)()

        changes.set_attribute(model, "forward", MethodType(forward, model))

    return change


def lead_autocast(accelerator: Accelerator, session: AmpSession) -> None:
    """Makes `accelerator.autocast()` enter the plan's default where accelerate would enter another."""
    autocast = accelerator.autocast
    on_cpu = _is_fp16_on_cpu(accelerator, session)

    @functools.wraps(autocast)
    def autocast_of_plan(autocast_handler: AutocastKwargs | None = None) -> Any:
        is_wanted = autocast_handler is None or autocast_handler.enabled
        if is_wanted and (on_cpu or session.plan.default is not session.asked_for):
            return session.autocast()
        return autocast(autocast_handler)

    session.changes.set_attribute(accelerator, "autocast", autocast_of_plan)


def _is_fp16_on_cpu(accelerator: Accelerator, session: AmpSession) -> bool:
    """Where accelerate builds neither scaler nor autocast, and runs FP32."""
    return not session.scaler.guards_only and accelerator.device.type == "cpu"


def _outputs_to_fp32(module: nn.Module, arguments: Any, output: Any) -> Any:
    """As accelerate does on other devices."""
    return convert_outputs_to_fp32(lambda: output)()
