"""Running statistics of batch norms: what a skipped step has made non-finite is put back to what it was before."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from hf_amp.statistics import snapshot

_NAMES = ("running_mean", "running_var")


def norms_of(model: nn.Module) -> list[weakref.ref[nn.Module]]:
    """The modules of `model` that gather running statistics: batch norms, and whatever names its buffers as they do."""
    return [weakref.ref(module) for module in model.modules() if next(_gathered_by(module), None) is not None]


class BatchNormStatistics:
    """What the norms of one model had gathered at one moment.

    A forward pass moves them before anybody knows whether its step will be applied. One NaN would stay in them for ever,
    and be in every evaluation and checkpoint from then on. Copies, on their own devices; no host read.

    Args:
        norms: what `norms_of` gave for the model.
    """

    def __init__(self, norms: Sequence[weakref.ref[nn.Module]]) -> None:
        gathered = [
            (norm, name, x) for norm in norms if (module := norm()) for name, x in _gathered_by(module)
        ]
        self._held = [(norm, name) for norm, name, _ in gathered]
        with torch.no_grad():
            self._copies = torch._foreach_mul([x for _, _, x in gathered], 1.0) if gathered else ()

    @torch.no_grad()
    def put_back(self) -> list[nn.Module]:
        """Puts back what is not finite and was so before; returns the modules that had it. One host read."""
        pairs = [
            (module, getattr(module, name), copy)
            for (norm, name), copy in zip(self._held, self._copies, strict=True)
            if (module := norm()) is not None
        ]
        if not pairs:
            return []
        lost = snapshot.read_all([~now.isfinite().all() & copy.isfinite().all() for _, now, copy in pairs])
        broken = [pair for pair, is_lost in zip(pairs, lost, strict=True) if is_lost]
        for _, now, copy in broken:
            now.copy_(copy)
        return list(dict.fromkeys(module for module, _, _ in broken))


def _gathered_by(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, buffer in module.named_buffers(recurse=False):
        if name in _NAMES and buffer.is_floating_point():
            yield name, buffer
