"""Puts a model and the random generators back to where a step began, so that it can be run again as if for the first time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_amp.random_state import RandomState, devices_of


class Rewind:
    """What a forward pass changes: buffers (running statistics) and random generators (dropout).

    Copies the buffers, on their devices. No host read.

    Args:
        model: about to be run.
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers: list[tuple[Tensor, Tensor]] = [
            (buffer, buffer.detach().clone()) for buffer in model.buffers()
        ]
        self._random_state = RandomState.now(devices_of(model))

    @torch.no_grad()
    def rewind(self) -> None:
        """Back to the moment of construction; any number of times."""
        for buffer, former in self._buffers:
            buffer.copy_(former)
        self._random_state.restore()
