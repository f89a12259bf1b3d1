"""Puts a model and the random generators back to where a step began, so that it can be run again as if for the first time."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Rewind:
    """What a forward pass changes: buffers (running statistics) and random generators (dropout).

    Copies the buffers, on their devices. No host read: the state of a CUDA generator lies on the host.

    Args:
        model: about to be run.
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers: list[tuple[Tensor, Tensor]] = [
            (buffer, buffer.detach().clone()) for buffer in model.buffers()
        ]
        self._cpu = torch.get_rng_state()
        devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
        self._cuda = {device: torch.cuda.get_rng_state(device) for device in devices}

    @torch.no_grad()
    def rewind(self) -> None:
        """Back to the moment of construction; any number of times."""
        for buffer, former in self._buffers:
            buffer.copy_(former)
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)
