"""Whether a derivative is not finite in FP32, tried on one block of a model in place of the whole: a third of the time.

Without it the whole model is run in FP32, forward and backward, which says the same.
"""

from __future__ import annotations

import functools
import math
from contextlib import suppress
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_amp.fallback.module_precision import CurrentPrecision, ForwardContext, holds_shards
from hf_amp.fallback.operators import OperatorTrace
from hf_amp.fallback.recorder import RecordedForward
from hf_amp.fallback.replay import (
    BackwardFindings,
    Found,
    float_tensors,
    gradient_ends,
    hooks_silent,
    non_finite_tensors,
    nothing_changes,
    repeat_forward,
)
from hf_amp.patch_log import removal, takes_hooks
from hf_amp.precision import PrecisionMode
from hf_amp.statistics import to_host_list
from hf_amp.tree import map_tensors


class BlockGradients:
    """Context that notes what comes to the outputs of blocks, the members of lists of modules, while a backward is repeated.

    Of sharded models nothing is noted. Keeps a gradient of each block's output.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._came_to: dict[str, dict[str, Tensor]] = {}

    def __enter__(self) -> BlockGradients:
        named = [] if holds_shards(self._model) else list(self._model.named_modules())
        lists = [(at, its) for at, its in named if isinstance(its, (nn.ModuleList, nn.Sequential))]
        blocks = [(f"{at}.{name}".lstrip("."), block) for at, its in lists for name, block in its.named_children()]
        self._remove = removal(
            [
                block.register_forward_hook(functools.partial(self._note, at))
                for at, block in blocks
                if takes_hooks(block)
            ]
        )
        return self

    def __exit__(self, *raised: object) -> None:
        self._remove()

    def _note(self, name: str, _block: nn.Module, _arguments: Any, output: Any) -> None:
        ran_before = name in self._came_to  # then what comes to its outputs is not one gradient
        gradients = self._came_to[name] = {"": torch.tensor(math.nan)} if ran_before else {}
        for path, x in float_tensors(output):
            if x.requires_grad and not ran_before:
                cast(Any, x).register_hook(functools.partial(gradients.__setitem__, path))

    def replay(
        self, forward: RecordedForward, current: CurrentPrecision, bad: BackwardFindings
    ) -> BackwardFindings | None:
        """Whether, and where, the derivative of the block that holds the first bad parameter is not finite in FP32.

        It is given what the model in FP32 gives it, and in backward what came to it. None where that is finite, or not known.
        Costs at most a forward pass of the model, and the backward pass of one block.
        """
        around = [name for name in self._came_to if bad.parameters and bad.parameters[0].startswith(f"{name}.")]
        name = max(around, key=len, default="")
        if not name or not self._came_to[name] or non_finite_tensors(self._came_to[name]):
            return None
        block, trace = forward.model.get_submodule(name), OperatorTrace(current, forward=False)
        named = [(f"{name}.{path}", p) for path, p in block.named_parameters() if p.requires_grad]
        found: list[tuple[str, Tensor]] = []

        def look(_block: nn.Module, arguments: Any, options: Any) -> None:
            handle.remove()
            with torch.enable_grad(), trace.watching(block, name):
                given = map_tensors(_cut, (arguments, options))
                outputs = dict(float_tensors(block(*given[0], **given[1])))
                starts = [(outputs[path], g.to(outputs[path])) for path, g in self._came_to[name].items()]
                trace.repeats_backward = True
                trace.watch_backward([x for x, _ in starts])
                found.extend(gradient_ends(starts, named, first_only=True) or ())
            raise Found

        handle = block.register_forward_pre_hook(look, with_kwargs=True)
        in_fp32, silent = current.entry.context(PrecisionMode.FP32), hooks_silent([p for _, p in named])
        with suppress(Exception), nothing_changes(forward.model), silent, ForwardContext.suspended(), in_fp32:
            repeat_forward(forward, in_fp32=True)
        handle.remove()
        wrong = [path for path, ends in found if not all(map(math.isfinite, to_host_list([ends])))]
        return BackwardFindings(wrong, frozenset(wrong), trace.in_backward) if wrong else None


def _cut(x: Tensor) -> Tensor:
    """`x` without what made it."""
    return x.detach().requires_grad_(x.is_floating_point())
