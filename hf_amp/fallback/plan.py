"""The precision of the run now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from hf_amp.config import PrecisionMode


@dataclass(frozen=True)
class PrecisionPlan:
    """A default precision, and the modules that differ from it.

    Attributes:
        default: precision of every module that `modules` does not name.
        modules: qualified module name → precision. Read-only.
    """

    default: PrecisionMode
    modules: Mapping[str, PrecisionMode] = field(default_factory=lambda: MappingProxyType({}))
