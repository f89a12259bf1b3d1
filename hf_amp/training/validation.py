"""Loss on held-out batches, in the precision of training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hf_amp.errors import BatchError
from hf_amp.training.batch import LossFunction
from hf_amp.training.epoch import EpochLosses
from hf_amp.training.standard import StandardMixedPrecisionTrainer


def validate(
    trainer: StandardMixedPrecisionTrainer,
    dataloader: Iterable[Any],
    model: nn.Module,
    loss_fn: LossFunction | None,
) -> dict[str, Any]:
    """`AdvancedMixedPrecisionManager.validate_epoch`."""
    modes = [(module, module.training) for module in model.modules()]
    losses = EpochLosses()
    model.eval()
    try:
        with torch.no_grad():
            for batch in dataloader:
                losses.add([trainer.evaluate(batch, model, loss_fn)], [batch])
    finally:
        for module, training in modes:
            module.training = training
    if not losses.batches:
        raise BatchError(
            "the dataloader gave no batch to validate on: check its dataset, sampler and drop_last."
        )
    return losses.figures()
