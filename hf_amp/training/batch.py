"""From a batch and a model to one scalar loss, whatever form they have."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_amp.errors import AttachError, BatchError
from hf_amp.statistics import held_by, to_device
from hf_amp.tree import copy_containers, replace_tensors, tensors_in

LossFunction = Callable[[Any, Any], Tensor]
"""(outputs of the model, targets of the batch) → tensor of shape []."""

LABELS = "labels"
"""Key of the targets in a mapping, as in transformers."""


def batch_to_device(batch: Any, device: torch.device) -> Any:
    """`batch` with every tensor in it on `device`. Tensors that are there already are not copied."""
    return replace_tensors(lambda tensor: to_device(tensor, device), copy_containers(batch))


def samples_in(batch: Any) -> int:
    """Rows of the first tensor in `batch`; 1 where there is none, or it has no dimension."""
    first = next((tensor for _, tensor in tensors_in(batch)), None)
    return 1 if first is None or not first.ndim else first.shape[0]


def compute_loss(model: nn.Module, batch: Any, loss_fn: LossFunction | None) -> Tensor:
    """Runs `model` on `batch`. No GPU-CPU sync.

    | batch | with `loss_fn` | without |
    |---|---|---|
    | mapping | `loss_fn(model(**rest), batch["labels"])` | `model(**batch)` returns a loss |
    | (inputs, targets) | `loss_fn(model(inputs), targets)` | `model(inputs, targets)` returns a loss |
    | tensor | `loss_fn(model(batch), batch)` | `model(batch)` returns a loss |

    A model returns a loss as a tensor, as `.loss`, under "loss", or as a mapping of losses alone, which are added.

    Returns:
        Tensor of shape []; the mean over devices under DataParallel.

    Raises:
        BatchError: the batch has another form or no labels, or what comes out is not one real number that depends on
            parameters.
    """
    if isinstance(batch, Mapping):
        outputs, targets = _call_with_mapping(model, batch, loss_fn)
    elif isinstance(batch, (list, tuple)) and len(batch) == 2:
        outputs, targets = (model(batch[0]) if loss_fn else _call_with_pair(model, batch)), batch[1]
    elif isinstance(batch, Tensor):
        outputs, targets = model(batch), batch
    else:
        length = f" of {len(batch)}" if isinstance(batch, (list, tuple)) else ""
        raise BatchError(
            f"the batch is a {type(batch).__name__}{length}: pass a mapping of the model's arguments, a pair "
            "(inputs, targets), or a tensor."
        )
    loss = loss_fn(outputs, targets) if loss_fn else _returned_loss(outputs, batch)
    return _checked(loss, model)


def _call_with_pair(model: nn.Module, batch: Sequence[Any]) -> Any:
    try:
        return model(*batch)
    except TypeError as error:
        if _takes(model, batch):
            raise
        raise BatchError(
            f"{type(model).__name__} cannot be called with a pair (inputs, targets), and without loss_fn= it would have to "
            "make the loss itself: pass loss_fn=, such as torch.nn.functional.cross_entropy."
        ) from error


def _takes(model: nn.Module, arguments: Sequence[Any]) -> bool:
    try:
        inspect.signature(model.forward).bind(*arguments)
    except TypeError:
        return False
    return True


def _call_with_mapping(model: nn.Module, batch: Mapping[str, Any], loss_fn: LossFunction | None) -> tuple[Any, Any]:
    if loss_fn is None:
        return model(**batch), None
    if LABELS not in batch:
        raise BatchError(
            f'the batch has no "{LABELS}" for loss_fn; its keys are {_names(batch)}. Add the targets under that key, '
            "or pass pairs (inputs, targets); where the model returns its losses, leave loss_fn out."
        )
    return model(**{name: value for name, value in batch.items() if name != LABELS}), batch[LABELS]


def _returned_loss(outputs: Any, batch: Any) -> Any:
    loss = outputs
    if isinstance(outputs, Mapping):
        numbers = [x for x in outputs.values() if isinstance(x, Tensor) and x.is_floating_point() and not x.dim()]
        all_losses = bool(numbers) and len(numbers) == len(outputs)  # as detectors of torchvision return them
        loss = sum(numbers) if "loss" not in outputs and all_losses else outputs.get("loss")
    elif not isinstance(outputs, Tensor):
        loss = getattr(outputs, "loss", None)
    if loss is None:
        keys = f"; the batch's keys are {_names(batch)}" if isinstance(batch, Mapping) else ""
        raise BatchError(
            f"the model returned no loss but a {type(outputs).__name__}{keys}. Put targets into the batch (for models "
            f'of transformers under "{LABELS}"), or pass loss_fn=.'
        )
    return loss


def _checked(loss: Any, model: nn.Module) -> Tensor:
    if not isinstance(loss, Tensor) or not loss.dtype.is_floating_point:
        what = str(loss.dtype) if isinstance(loss, Tensor) else type(loss).__name__
        raise BatchError(f"the loss is a {what}: the model or loss_fn must return a floating-point tensor of shape [].")
    if isinstance(model, nn.DataParallel):
        loss = loss.mean()
    if loss.numel() != 1:
        raise BatchError(
            f"the loss has shape {tuple(loss.shape)}: it must be one number, such as loss.mean(); where the model "
            "returns no loss but outputs, pass loss_fn=."
        )
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise BatchError(
            "the loss does not depend on any parameter that requires grad: unfreeze parameters, and compute the loss "
            "without torch.no_grad() or .detach()."
        )
    scalar: Tensor = loss.reshape(())
    return scalar


def _names(batch: Mapping[str, Any]) -> str:
    return ", ".join(map(str, batch)) or "none"


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
    if hasattr(optimizer, "step_was_skipped") is not accelerated:  # accelerate's, without importing accelerate
        raise AttachError(
            "the optimizer was prepared by an Accelerator: pass accelerator= to the trainer or manager."
            if not accelerated
            else "the optimizer was not prepared by the Accelerator: pass it through accelerator.prepare() first."
        )
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    held = list(held_by(optimizer))
    if not any(id(parameter) in trainable for parameter in held):
        raise AttachError(
            f"the optimizer holds {len(held)} parameters, and none is among the {len(trainable)} trainable ones of this "
            f"{type(model).__name__}: make the optimizer from model.parameters(), after moving or wrapping the model."
        )
