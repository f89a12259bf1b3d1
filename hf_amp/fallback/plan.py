"""The precision of the run now."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch

from hf_amp.device import Hardware
from hf_amp.precision import PrecisionMode
from hf_amp.statistics import all_reduce_max_to_host, is_distributed


@dataclass(frozen=True)
class PrecisionPlan:
    """A default precision, and the modules that differ from it.

    Attributes:
        default: precision of every module that `modules` does not name.
        modules: qualified module name → precision, which holds for what is inside of the module too. Read-only.
    """

    default: PrecisionMode
    modules: Mapping[str, PrecisionMode] = field(default_factory=lambda: MappingProxyType({}))

    def with_default(self, default: PrecisionMode) -> PrecisionPlan:
        """The same modules under another default."""
        return PrecisionPlan(default, self.modules)

    def with_modules(self, names: Iterable[str], precision: PrecisionMode) -> PrecisionPlan:
        """The same, with the modules of these names in `precision`."""
        return PrecisionPlan(self.default, MappingProxyType({**self.modules, **dict.fromkeys(names, precision)}))

    def without_modules(self, names: Iterable[str]) -> PrecisionPlan:
        """The same, with the modules of these names back in the default."""
        gone = set(names)
        kept = {name: precision for name, precision in self.modules.items() if name not in gone}
        return PrecisionPlan(self.default, MappingProxyType(kept))

    def holds(self, name: str) -> bool:
        """Whether the module of this name, or one that it is inside of, is among `modules`."""
        return any(name == held or name.startswith(f"{held}.") for held in self.modules)

    def precision_of(self, names: Sequence[str]) -> PrecisionMode:
        """The precision of the modules of these names, which share one; that of the whole model where there are none."""
        return self.modules.get(names[0], self.default) if names else self.default

    def format_shares(self, sizes: Iterable[tuple[str, int]]) -> dict[str, float]:
        """Name of a number format → share of the parameters that are used in it.

        Args:
            sizes: (qualified name, elements) of every parameter; none are taken for one parameter of the whole model.
        """
        elements: Counter[str] = Counter()
        for name, count in list(sizes) or [("", 1)]:
            held = next((m for m in self.modules if name.startswith(f"{m}.")), None)
            elements[(self.default if held is None else self.modules[held]).number_format.name] += count
        return {used_in: count / elements.total() for used_in, count in elements.items()}

    def describe(self) -> str:
        """One phrase."""
        differ = len(self.modules) if self.default is not PrecisionMode.FP32 else 0
        inside = f" with {differ} module{'s' * (differ > 1)} in FP32" if differ else ""
        return f"{self.default.number_format.name}{inside}"

    def to_plain(self) -> dict[str, Any]:
        """Strings only, for checkpoints."""
        modules = {name: precision.value for name, precision in self.modules.items()}
        return {"default": self.default.value, "modules": modules}


def precision_order(mode: PrecisionMode, hardware: Hardware, emulate: bool) -> tuple[PrecisionMode, ...]:
    """The precisions from `mode` to the widest: BF16 where there are units for it.

    Emulation stands for a GPU whose units are for FP16 alone (V100, T4), whatever this CPU has: a run is the same on
    every machine.
    """
    if mode in (PrecisionMode.MIXED, PrecisionMode.FP16):
        return (mode, *[PrecisionMode.BF16] * (hardware.bf16 == "native" and not emulate), PrecisionMode.FP32)
    return (mode, PrecisionMode.FP32) if mode is PrecisionMode.BF16 else (mode,)


def common_to_ranks(hardware: Hardware, device: torch.device) -> Hardware:
    """`hardware`, with units for BF16 only where every rank has them, so that all have the same order.

    Called by all ranks. One all-reduce and one GPU-CPU sync where there are several, nothing elsewhere.
    """
    if not is_distributed():
        return hardware
    (somebody_lacks_it,) = all_reduce_max_to_host(torch.tensor([float(hardware.bf16 != "native")], device=device))
    return replace(hardware, bf16="slow") if somebody_lacks_it and hardware.bf16 == "native" else hardware
