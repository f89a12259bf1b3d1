"""Whether a model and an optimizer can be trained together."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hf_amp.errors import AttachError


def check_is_model(model: Any) -> None:
    """Before anything is asked of `model`.

    Raises:
        AttachError: it is something else.
    """
    if not isinstance(model, nn.Module):
        raise AttachError(f"the model is a {type(model).__name__}: pass a torch.nn.Module.")


def check_belongs_together(model: Any, optimizer: Any, accelerated: bool) -> None:
    """Looks at identities only; reads no tensor.

    Args:
        accelerated: whether an Accelerator was passed to the trainer.

    Raises:
        AttachError: one of them is something else, the optimizer is another model's, nothing can be trained, or the
            Accelerator that prepared the optimizer was not passed.
    """
    check_is_model(model)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise AttachError(f"the optimizer is a {type(optimizer).__name__}: pass a torch.optim.Optimizer.")
    if (
        hasattr(optimizer, "step_was_skipped") is not accelerated
    ):  # accelerate's, without importing accelerate
        raise AttachError(
            "the optimizer was prepared by an Accelerator: pass accelerator= to the trainer or manager."
            if not accelerated
            else "the optimizer was not prepared by the Accelerator: pass it through accelerator.prepare() first."
        )
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not any(id(parameter) in trainable for parameter in held):
        raise AttachError(
            f"the optimizer holds {len(held)} parameters, and none is among the {len(trainable)} trainable ones of this "
            f"{type(model).__name__}: make the optimizer from model.parameters(), after moving or wrapping the model."
        )
