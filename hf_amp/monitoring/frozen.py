"""Half-precision parameters whose updates rounding loses: how much, which stand still, and what each remedy costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_amp.events import AmpEvent, EventKind, join_names
from hf_amp.precision import NumberFormat
from hf_amp.serialization import parse, parse_fields
from hf_amp.statistics import to_host

FROZEN_SHARE = 0.99
"""Lost share of a parameter's updates from which on it stands still."""
LOOKS = 6
"""Sampled steps in a row in which that has to be so."""


@dataclass(frozen=True)
class Remedy:
    """A value of `half_parameters` that keeps updates.

    Attributes:
        parameter_bytes: what it adds to a half-precision parameter and its gradient.
        state_bytes: what it adds to an element of state that the optimizer keeps in half precision.
    """

    name: str
    parameter_bytes: int
    state_bytes: int

    def added_bytes(self, elements: int, state_elements: int) -> int:
        """What it adds to a model with so many half-precision elements of parameters and of state."""
        return self.parameter_bytes * elements + self.state_bytes * state_elements


REMEDIES = (
    Remedy("stochastic_rounding", 0, 0),
    Remedy("kahan", 2, 0),
    Remedy("upcast", 4, 2),
    Remedy("master_weights", 6, 2),
)
"""From the smallest. FP32 gradients count: 2 bytes more than a half-precision parameter has."""


def remedies_in_words(elements: int, state_elements: int, sharded: bool = False) -> str:
    """Every remedy with the memory that it adds, as a sentence."""
    fit = [r for r in REMEDIES if not sharded or r.name in ("stochastic_rounding", "kahan")]
    costs = [f'"{r.name}" adds {size_in_words(r.added_bytes(elements, state_elements))}' for r in fit]
    shards = "; or shards of FP32 (dtype=torch.float32 in from_pretrained)" if sharded else ""
    return f"half_parameters keeps them: {', '.join(costs)}{shards}."


BYTES_AS_IT_IS, STATE_OF_ADAMW = 8, 2
"""Of a half-precision parameter with AdamW: itself, its gradient and two averages; and how many of these there are."""


def bytes_a_parameter() -> dict[str, int]:
    """Bytes that a half-precision parameter takes in training with AdamW: as it is (None), and with every remedy."""
    return {"None": BYTES_AS_IT_IS} | {r.name: BYTES_AS_IT_IS + r.added_bytes(1, STATE_OF_ADAMW) for r in REMEDIES}


def predicted_lost_share(weights: Tensor, rate: float, number_format: NumberFormat) -> float:
    """Share of `weights`, of any shape and float dtype, that updates of `rate` would leave as they are in `number_format`.

    AdamW and Lion move every element by about their learning rate in the first steps; what is below half the distance to
    the next value, which the exponent alone tells, is lost. One GPU-CPU sync.
    """
    wide = weights.detach().to(number_format.dtype).float()
    spacing = torch.ldexp(torch.ones_like(wide), torch.frexp(wide).exponent - 1) * torch.finfo(number_format.dtype).eps
    lost = (wide != 0) & (rate < spacing.clamp(min=number_format.smallest_subnormal) / 2)
    return to_host({"lost": lost.float().mean()})["lost"]


def size_in_words(count: int) -> str:
    """As "1.3 GB"; powers of ten."""
    if not count:
        return "nothing"
    power = min(int(math.log10(count)) // 3, 4)
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


@dataclass(frozen=True)
class HalfParameter:
    """One parameter at a sampled step: qualified name, elements, and the lost share of its updates, NaN where none was due."""

    name: str
    elements: int
    lost: float


@dataclass
class FrozenDetector:
    """Says once how much is lost in a run, and once which parameters stand still because of it.

    Attributes:
        looks: name of a parameter → sampled steps in a row that have lost nearly all of its updates.
        warned: whether the lost share has been reported.
        reported: whether parameters that stand still have been.
    """

    looks: dict[str, int] = field(default_factory=dict)
    warned: bool = False
    reported: bool = False

    @property
    def suspects(self) -> bool:
        """Whether the coming steps are to be sampled, to be certain."""
        return not self.reported and any(self.looks.values())

    def after_look(
        self, step: int, lost: float | None, parameters: Sequence[HalfParameter], formats: str, rate: str, remedies: str
    ) -> list[AmpEvent]:
        """One sampled step; what it shows, where that is new.

        Args:
            lost: share of all updates of half-precision elements that were lost; None where not known.
            parameters: all half-precision ones of the optimizer.
            formats: what they are, such as "BF16".
            rate: the learning rate in words.
            remedies: what to do, as a sentence.
        """
        due, events = [p for p in parameters if math.isfinite(p.lost)], list[AmpEvent]()
        for parameter in due:
            self.looks[parameter.name] = self.looks.get(parameter.name, 0) + 1 if parameter.lost >= FROZEN_SHARE else 0
        elements = sum(p.elements for p in parameters)
        names = join_names([p.name for p in sorted(due, key=lambda p: -p.lost)])
        if due and lost is not None and not self.warned:
            self.warned = True
            message = (
                f"rounding loses {share_in_words(lost)} of the updates of {len(parameters)} {formats} parameters ({names}) in "
                f"this run, at {rate}. {remedies}"
            )
            figures = {"parameters": len(parameters), "elements": elements, "lost_update_fraction": lost}
            events.append(AmpEvent(step, EventKind.HALF_PARAMETERS, message=message, figures=figures))
        frozen = [p for p in due if self.looks[p.name] >= LOOKS]
        if frozen and not self.reported:
            self.reported = True
            frozen.sort(key=lambda p: (-p.lost, -p.elements))
            ordered = tuple(p.name for p in frozen)
            one = len(frozen) == 1
            message = (
                f"{len(frozen)} of {len(parameters)} {formats} parameters {'stands' if one else 'stand'} still "
                f"({join_names(ordered)}): rounding has lost all, or nearly all, of {'its' if one else 'their'} updates in {LOOKS} sampled "
                f"steps, although gradients are not zero and neither is {rate}. {remedies}"
            )
            figures = {"parameters": len(frozen), "elements": sum(p.elements for p in frozen)}
            events.append(AmpEvent(step, EventKind.FROZEN, modules=ordered, message=message, figures=figures))
        return events

    def state_dict(self) -> dict[str, Any]:
        """Every field."""
        return dataclasses.asdict(self)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues from `state_dict`. Raises `StateError` where it is none; nothing has changed then."""
        vars(self).update(parse_fields(FrozenDetector, parse(dict[str, Any], state_dict, "frozen"), "frozen"))


def share_in_words(share: float) -> str:
    """As "85%" or "99.99999%": as many digits as tell it from all and from nothing."""
    if share in (0.0, 1.0):
        return "none" if share == 0 else "all"
    digits = max(0, math.ceil(-math.log10(min(share, 1 - share))) - 2)
    return f"{100 * share:.{min(digits, 6)}f}%"
