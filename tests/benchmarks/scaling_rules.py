"""Reference implementations of other scalers' rules, slow and obvious, for comparison only."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


class RuleScaler:
    """Scale, unscale, step and update with a host read wherever it is easiest; a rule gives the next scale."""

    def __init__(self, rule: Callable[[bool, list[Tensor]], float], scale: float) -> None:
        self._rule, self._scale = rule, scale
        self._gradients: list[Tensor] = []
        self._overflow = False

    def scale(self, loss: Tensor) -> Tensor:
        return loss * self._scale

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter in held:
            parameter.grad /= self._scale
        self._gradients = [parameter.grad.clone() for parameter in held]
        self._overflow = not all(bool(gradient.isfinite().all()) for gradient in self._gradients)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        if not self._overflow:
            optimizer.step()

    def update(self) -> None:
        self._scale = self._rule(self._overflow, [g * self._scale for g in self._gradients])

    def get_scale(self) -> float:
        return self._scale


class Oracle(RuleScaler):
    """The largest power of two at which a loss `factor` times as large would not overflow in this very step.

    It tries them out before each step. A rule that knows no more of the next step than that this may come in it, and is
    not to skip then, can use no larger scale.
    """

    def __init__(self, parameters: list[Tensor], factor: float, scale: float) -> None:
        super().__init__(lambda overflow, scaled: self._scale, scale)
        self._parameters, self._factor = parameters, factor

    def scale(self, loss: Tensor) -> Tensor:
        while self._fits(loss, 2 * self._scale):
            self._scale *= 2
        while loss.isfinite() and not self._fits(loss, self._scale):
            self._scale /= 2
        return super().scale(loss)

    def _fits(self, loss: Tensor, scale: float) -> bool:
        gradients = torch.autograd.grad(loss * self._factor * scale, self._parameters, retain_graph=True)
        return all(bool(gradient.isfinite().all()) for gradient in gradients)


class HysteresisRule:
    """DeepSpeed's and Megatron's. Source: `loss_scale_window` 1000, `hysteresis` 2, `min_loss_scale` 1 of both."""

    def __init__(self, scale: float) -> None:
        self._scale, self._clean, self._left = scale, 0, 2

    def __call__(self, overflow: bool, scaled: list[Tensor]) -> float:
        if overflow:
            self._clean = 0
            if self._left == 1:
                self._scale = max(self._scale / 2, 1.0)
            else:
                self._left -= 1
        else:
            self._clean += 1
            if self._clean % 1000 == 0:
                self._scale, self._left = self._scale * 2, 2
        return self._scale


class LogMaxRule:
    """OpenSeq2Seq's LogMax, with its flaw: an overflow feeds 2^16 into the statistics."""

    def __init__(self, scale: float) -> None:
        self._scale, self._steps = scale, 0
        self._mean = self._slow_mean = self._slow_square = 0.0

    def __call__(self, overflow: bool, scaled: list[Tensor]) -> float:
        amax = max(gradient.abs().max().item() for gradient in scaled) / self._scale
        x = 16.0 if overflow else math.log2(max(amax, 1e-30))
        self._steps += 1
        self._mean = 0.99 * self._mean + 0.01 * x
        self._slow_mean = 0.999 * self._slow_mean + 0.001 * x
        self._slow_square = 0.999 * self._slow_square + 0.001 * x * x
        correction = 1 - 0.999**self._steps
        variance = self._slow_square / correction - (self._slow_mean / correction) ** 2
        expected = self._mean / (1 - 0.99**self._steps) + 3.09 * math.sqrt(max(variance, 0.0))
        self._scale = 2.0 ** math.floor(16 - expected)
        return self._scale


class HistogramRule:
    """Graphcore's ALS: halve where more than 1e-7 of all elements lie above an eighth of FP16's range, else double."""

    PERIOD = 10

    def __init__(self, scale: float) -> None:
        self._scale, self._above, self._total, self._steps = scale, 0, 0, 0

    def __call__(self, overflow: bool, scaled: list[Tensor]) -> float:
        edge = 0.125 * torch.finfo(torch.float16).max
        self._above += sum(int((~(gradient.abs() <= edge)).sum()) for gradient in scaled)
        self._total += sum(gradient.numel() for gradient in scaled)
        self._steps += 1
        if self._steps % self.PERIOD == 0:
            self._scale *= 0.5 if self._above / self._total > 1e-7 else 2.0
            self._above = self._total = 0
        return self._scale
