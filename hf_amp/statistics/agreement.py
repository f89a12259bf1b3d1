"""One small all-reduce, so that every rank decides alike."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from hf_amp.statistics import snapshot


def is_needed() -> bool:
    """Whether there is more than one process to agree with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def largest_over_ranks(*values: Tensor) -> tuple[Tensor, ...]:
    """The element-wise maximum over all ranks of tensors of shape [], float32, in one all-reduce. No host read.

    NaN, of which MAX loses track on some backends, travels as inf.
    """
    packed = torch.stack([value.float().nan_to_num(nan=torch.inf, posinf=torch.inf) for value in values])
    dist.all_reduce(packed, op=dist.ReduceOp.MAX)
    return tuple(packed.unbind())


def largest_elements_over_ranks(values: Tensor) -> list[float]:
    """The element-wise maximum over all ranks of a tensor of shape [n], float32, finite, in one all-reduce and one host read."""
    agreed = values.clone()
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
    return snapshot.read_vector(agreed)
