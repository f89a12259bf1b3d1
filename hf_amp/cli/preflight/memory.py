"""Memory of training by arithmetic: bytes a parameter in each precision, for what stays there from step to step."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

ADAM_STATES = 2


@dataclass(frozen=True)
class Recipe:
    """What a trainable parameter takes, in bytes.

    Attributes:
        name: the precision, and what is meant by it.
        weights: of the parameter, FP32 master weights included.
        gradients: of its gradient.
        optimizer: of Adam's two averages.
        casts: of its half-precision copy, which autocast keeps for the length of a forward pass.
    """

    name: str
    weights: int
    gradients: int
    optimizer: int
    casts: int

    def total_bytes(self, trainable: int, frozen: int) -> int:
        """For so many parameters; a frozen one has weights and a cast, in the same formats, and nothing else."""
        frozen_weights = min(self.weights, 4)
        return trainable * (self.weights + self.gradients + self.optimizer + self.casts) + frozen * (
            frozen_weights + self.casts
        )


RECIPES = (
    Recipe("FP32", 4, 4, 4 * ADAM_STATES, 0),
    Recipe("MIXED (fp16=True) or BF16 (bf16=True)", 4, 4, 4 * ADAM_STATES, 2),
    Recipe("FP16 parameters, FP32 master weights", 2 + 4, 2, 4 * ADAM_STATES, 0),
    Recipe("BF16 parameters alone (small updates are lost)", 2, 2, 2 * ADAM_STATES, 0),
)
"""Source: dtypes of the tensors that each keeps: autocast keeps parameters, gradients and Adam in FP32."""


def counted(model: nn.Module) -> tuple[int, int]:
    """(trainable, frozen) elements of all parameters; a tied one counts once."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, sum(p.numel() for p in model.parameters()) - trainable


def elements_by_dtype(model: nn.Module) -> Counter[str]:
    """Name of a dtype → elements of parameters that have it."""
    counts: Counter[str] = Counter()
    for parameter in model.parameters():
        counts[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return counts


def half_precision_trouble(model: nn.Module) -> list[str]:
    """What the dtypes of the parameters will lead to, a sentence each; empty where all trainable ones are FP32."""
    found = []
    for dtype, consequence in (
        (torch.float16, "the stock scaler raises 'Attempting to unscale FP16 gradients'"),
        (
            torch.bfloat16,
            "updates smaller than 1/256 of a weight are lost, and norm weights do not move at small learning rates",
        ),
    ):
        names = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype == dtype]
        if names:
            found.append(
                f"{len(names)} trainable parameters are {str(dtype).removeprefix('torch.')} ({names[0]} among them): "
                f"{consequence}. Load with dtype=torch.float32, or call model.float() before training."
            )
    return found
