"""Makes a model overflow FP16 without changing its function, and trains it as if nothing had been done to it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Rescaling:
    """Factors that cancel out over a model, such as one on all that writes to a residual stream which norms read.

    Powers of two round nothing: the rescaled model then gives what the plain one gives to the last bit.

    Attributes:
        parameters: pattern of qualified parameter names → factor on the parameter, dimensionless.
        norms: pattern of qualified module names → factor by which the inputs of these norms have grown.
    """

    parameters: Mapping[str, float]
    norms: Mapping[str, float] = field(default_factory=dict)

    def apply(self, model: nn.Module) -> None:
        """Multiplies parameters in place, and the epsilon of norms, which is added to a square, by the squared factor."""
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.mul_(_matching(self.parameters, name))
        for name, module in model.named_modules():
            for epsilon in ("eps", "variance_epsilon"):
                if hasattr(module, epsilon):
                    setattr(module, epsilon, getattr(module, epsilon) * _matching(self.norms, name) ** 2)

    def parameter_groups(self, model: nn.Module, learning_rate: float) -> list[dict[str, Any]]:
        """Groups for `torch.optim.AdamW` under which the rescaled model learns what the plain one would.

        A parameter times c has gradients divided by c, and must move c times as far; AdamW moves by the learning rate
        whatever the size of the gradients, but for its epsilon (1e-8 by default).
        """
        # The plain ones come first: a Trainer logs the learning rate of the first group.
        groups: dict[float, list[nn.Parameter]] = {1.0: []}
        for name, parameter in model.named_parameters():
            groups.setdefault(_matching(self.parameters, name), []).append(parameter)
        return [
            {"params": members, "lr": learning_rate * factor, "eps": 1e-8 / factor, "weight_decay": 0.0}
            for factor, members in groups.items()
            if members
        ]


def _matching(factors: Mapping[str, float], name: str) -> float:
    """The factor of the pattern that matches the whole of `name`; 1 where none does."""
    return next((factor for pattern, factor in factors.items() if re.fullmatch(pattern, name)), 1.0)
