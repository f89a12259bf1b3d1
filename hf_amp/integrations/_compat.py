"""Private names of accelerate and torch that the integrations need, each read in one place.

`tests/contract` fails by name when one goes.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy


def prepared_models(accelerator: Accelerator) -> list[nn.Module]:
    """The models that `accelerator` has prepared."""
    return list(accelerator._models)


WHOLE = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
"""FSDP2 gathers parameters in FP32, and leaves all casts to autocast: the residual stream, and modules in FP32, are as without it."""


def gathers_bf16(accelerator: Accelerator) -> bool:
    """Whether FSDP2 casts the parameters that it gathers for `accelerator` to BF16."""
    policy = accelerator.state.fsdp_plugin.mixed_precision_policy
    return policy is not None and policy.param_dtype == torch.bfloat16


def gathers_whole_by_default(accelerator: Accelerator, also_bf16: bool) -> bool:
    """Whether FSDP2 may gather in FP32 what it is to prepare: the policy is the one that accelerate makes where the user gives none."""
    dtypes = {"fp16": torch.float16, **({"bf16": torch.bfloat16} if also_bf16 else {})}
    dtype = dtypes.get(accelerator.mixed_precision)
    default = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype, output_dtype=dtype)
    is_default = dtype is not None and accelerator.state.fsdp_plugin.mixed_precision_policy == default
    return is_default and not prepared_models(accelerator)


def in_its_ddp(model: nn.Module) -> nn.Module:
    """The DistributedDataParallel around a prepared model, of which accelerate keeps no hold; `model` where there is none."""
    around = (x for x in gc.get_objects() if issubclass(type(x), nn.parallel.DistributedDataParallel))
    return next((ddp for ddp in around if ddp.module is model), model)


def forward_before_autocast(model: nn.Module) -> Callable[..., Any]:
    """The function behind `model.forward` that accelerate has wrapped in autocast; takes the model as its first argument."""
    own = vars(model)  # inside of a compiled module, which hands that name on to it, `forward` is not wrapped
    forward = own.get("_original_forward", model.forward) if "forward" in own else model.forward
    return getattr(forward, "__func__", lambda model, *args, **kwargs: forward(*args, **kwargs))


def prepared_optimizers(accelerator: Accelerator) -> list[AcceleratedOptimizer]:
    """The optimizers that `accelerator` has prepared."""
    return list(accelerator._optimizers)


def has_step_hooks(optimizer: torch.optim.Optimizer, besides: type) -> bool:
    """Whether anybody has registered a hook that runs before `optimizer.step`, and may look at gradients there.

    Args:
        besides: the type of those that do not.
    """
    return any(not isinstance(hook, besides) for hook in optimizer._optimizer_step_pre_hooks.values())


def steps_in_backward(optimizer: torch.optim.Optimizer) -> bool:
    """Whether hooks on the parameters, or a backward of its own, move them before `optimizer.step`.

    Sources: LOMO's `fused_backward`, which accelerate calls; the `optimizer_dict` (parameter → optimizer) of transformers'
    LayerWiseDummyOptimizer.
    """
    by_parameter = getattr(optimizer, "optimizer_dict", None)
    layerwise = isinstance(by_parameter, dict) and any(isinstance(p, torch.Tensor) for p in by_parameter)
    return layerwise or hasattr(optimizer, "fused_backward")


def forget_skip(optimizer: AcceleratedOptimizer, was_skipped: bool = False) -> None:
    """Makes `optimizer.step_was_skipped` False, or `was_skipped`."""
    optimizer._is_overflow = was_skipped


def replace_scaler(optimizer: AcceleratedOptimizer, scaler: torch.amp.GradScaler | None) -> None:
    """Gives a prepared optimizer another scaler, by the way that it is unpickled, which sets up what it needs for it."""
    optimizer.__setstate__({**AcceleratedOptimizer.__getstate__(optimizer), "scaler": scaler})
    if scaler is None:
        for name in ("_accelerate_step_called", "_optimizer_original_step_method", "_optimizer_patched_step_method"):
            vars(optimizer).pop(name, None)
