"""Headroom, underflow and activations by module: where in the model precision is short."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_amp.monitoring.metrics import BY_MODULE
from hf_amp.patch_log import compile_disabled, takes_hooks
from hf_amp.precision import FP16_FORMAT
from hf_amp.statistics import amax_of_each, elements_of, to_device, total_amax, underflow_fraction, underflow_of_each

HEADROOM, UNDERFLOW, ACTIVATION, LOST = (metric.name for metric in BY_MODULE)


class ModuleMonitor:
    """The newest figures of every module, taken in sampled steps, and brought to the host by their one GPU-CPU sync.

    In such a step every module without children has a forward hook for its output, and gradients are passed over once
    more. In all other steps there is neither. What a compiled model computes inside of its graph is not seen.

    Args:
        interval: optimizer steps between two sampled steps.
    """

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._handles: list[Any] = []
        self._activations: dict[str, Tensor] = {}
        self._asked: dict[int, dict[str, list[str]]] = {}
        self._newest: dict[str, dict[str, float]] = {HEADROOM: {}, UNDERFLOW: {}, ACTIVATION: {}, LOST: {}}
        self._fresh = False

    def is_sampled(self, decided_steps: int) -> bool:
        """Whether the step after `decided_steps` is a sampled one."""
        return decided_steps % self._interval == 0

    def register_model(self, model: nn.Module, decided_steps: int) -> None:
        """Looks at the modules of `model` too, without keeping it alive."""
        self._models.add(model)
        if self.is_sampled(decided_steps):
            self.install_hooks()

    def install_hooks(self) -> None:
        """Puts hooks on all modules for the forward passes of the coming step."""
        self.remove_hooks()
        for model in self._models:
            for name, module in model.named_modules():
                if takes_hooks(module) and not any(True for _ in module.children()):
                    self._handles.append(module.register_forward_hook(self._hook(name)))

    def remove_hooks(self) -> None:
        """Takes the hooks away again. Harmless where there are none."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, name: str) -> Callable[..., Any]:
        @compile_disabled
        def look(module: nn.Module, arguments: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or not output.is_floating_point() or not output.numel():
                return
            if torch.is_grad_enabled():
                peak = total_amax([output.detach()], output.device)
                former = self._activations.get(name)
                if former is not None:  # of another device under DataParallel
                    peak = torch.maximum(former, to_device(peak, former.device))
                self._activations[name] = peak

        return look

    def collect(
        self,
        optimizer: int,
        names: Callable[[], Sequence[str]],
        gradients: Sequence[Tensor],
        scale: Tensor,
        *,
        scaled: bool,
        no_scaling: bool,
        decided_steps: int,
    ) -> dict[str, Tensor]:
        """What is to come to the host with this step's sync, name → tensor of shape [n]; and hooks for a coming sampled step.

        Nothing in a step that is not sampled. No GPU-CPU sync.

        Args:
            optimizer: `id` of the one that steps; a run may have several.
            names: gives the qualified names of the parameters that the gradients belong to.
            gradients: as they are now.
            scale: the loss scale of their backward, shape [].
            scaled: whether they are still multiplied by it.
            no_scaling: whether nothing is scaled (BF16, FP32), so that gradients have no headroom in FP16.
            decided_steps: steps before this one; chooses the sample for underflow.
        """
        figures: dict[str, Tensor] = {}
        if self.is_sampled(decided_steps):
            self.remove_hooks()
            activations, self._activations = self._activations, {}
            asked = self._asked[optimizer] = {ACTIVATION: list(activations)}
            if activations:
                figures[ACTIVATION] = torch.stack([to_device(peak, scale.device) for peak in activations.values()])
            if not no_scaling:
                factor = torch.ones_like(scale) if scaled else scale
                asked[HEADROOM] = asked[UNDERFLOW] = [name.rpartition(".")[0] for name in names()]
                figures[HEADROOM] = amax_of_each(gradients, scale.device) * factor
                figures[UNDERFLOW] = underflow_of_each(gradients, FP16_FORMAT, factor, decided_steps).reshape(-1)
        if self.is_sampled(decided_steps + 1):
            self.install_hooks()
        return figures

    def take(self, optimizer: int, host: Mapping[str, float]) -> None:
        """Takes in what `collect` asked for, as the host has read it; nothing where this step did not ask."""
        for name, modules in self._asked.get(optimizer, {}).items():
            values, largest = elements_of(host, name), dict[str, float]()
            if name == UNDERFLOW:
                values = [underflow_fraction(values[i : i + 5]) for i in range(0, len(values), 5)]
            for module, value in zip(modules, values, strict=True) if len(modules) == len(values) else ():
                if name == UNDERFLOW and math.isnan(value):
                    self._newest[name].pop(module, None)
                else:
                    largest[module] = max(value, largest.get(module, value))  # a module's worst parameter speaks for it
            if name == HEADROOM:
                bounded = {module: peak for module, peak in largest.items() if 0 < peak < math.inf}
                largest = {module: math.log2(FP16_FORMAT.largest / peak) for module, peak in bounded.items()}
            self.add(name, largest)

    def add(self, figure: str, values: Mapping[str, float]) -> None:
        """Takes in newer values of a figure, by name."""
        self._newest[figure].update(values)
        self._fresh = self._fresh or bool(values)

    def by_module(self) -> dict[str, dict[str, float]]:
        """Name of a figure → qualified module name → newest value; figures that no module has are absent."""
        return {name: dict(values) for name, values in self._newest.items() if values}

    def unlogged(self) -> dict[str, dict[str, float]]:
        """The same if it is newer than at the last call, else nothing."""
        fresh, self._fresh = self._fresh, False
        return self.by_module() if fresh else {}
