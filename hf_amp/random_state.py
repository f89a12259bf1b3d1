"""Where the random generators stand that dropout draws from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class RandomState:
    """The states of the CPU's generator and of those of some CUDA devices. They lie on the host: no device is read.

    Attributes:
        cpu: of the CPU's, shape [n], uint8.
        cuda: device → that of its generator, likewise.
    """

    cpu: Tensor
    cuda: Mapping[torch.device, Tensor]

    @classmethod
    def now(cls, devices: Iterable[torch.device]) -> RandomState:
        """The present one, of the CPU and of what is CUDA among `devices`."""
        cuda = {device for device in devices if device.type == "cuda"}
        return cls(torch.get_rng_state(), {device: torch.cuda.get_rng_state(device) for device in cuda})

    def restore(self) -> None:
        """Makes it the present one."""
        torch.set_rng_state(self.cpu)
        for device, state in self.cuda.items():
            torch.cuda.set_rng_state(state, device)

    def has_moved(self) -> bool:
        """Whether anything was drawn since."""
        now = RandomState.now(self.cuda)
        same = (torch.equal(now.cuda[device], state) for device, state in self.cuda.items())
        return not (torch.equal(now.cpu, self.cpu) and all(same))


def devices_of(model: nn.Module) -> set[torch.device]:
    """Where `model`'s parameters are."""
    return {parameter.device for parameter in model.parameters()}
