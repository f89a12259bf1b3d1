"""What several processes send each other: gradients, in half precision where the config says so."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DDPCommunicationHookType, DistributedType
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_amp.errors import AttachError, ConfigError
from hf_amp.integrations.upstream import prepared_models
from hf_amp.precision import NumberFormat, PrecisionMode
from hf_amp.session import AmpSession

_REDUCTION = "_hf_amp_reduction"


class GradientReduction:
    """How one DistributedDataParallel model averages its gradients over the ranks.

    Attributes:
        dtype: what they travel in; None for as they are, in which case the result is that of no hook at all.
    """

    def __init__(self) -> None:
        self.dtype: torch.dtype | None = None

    def average(self, bucket: Any) -> Any:
        """A communication hook: the mean of `bucket` over all ranks, as a future of its flat buffer.

        Each rank divides before it rounds, so that what travels and is summed is the mean, never the larger sum: its
        largest magnitude is the one that the headroom is taken from. A gradient beyond the range becomes inf, on all
        ranks alike, and so an overflow.
        """
        buffer: Tensor = bucket.buffer()
        buffer.div_(dist.get_world_size())
        sent = buffer if self.dtype is None else buffer.to(self.dtype)
        return (
            dist.all_reduce(sent, async_op=True).get_future().then(lambda done: buffer.copy_(done.value()[0]))
        )


def reduce_gradients_in_half(accelerator: Accelerator, session: AmpSession) -> None:
    """Makes DistributedDataParallel send gradients in `config.communication_precision`, if that is set.

    torch cannot take a communication hook off a model: after `detach` it stays, and averages as without it.

    Raises:
        ConfigError: FP16 in a run whose gradients are not scaled; or another communication hook is asked for.
        AttachError: models are prepared already.
    """
    precision = session.config.communication_precision
    if precision is None:
        return
    if precision is PrecisionMode.FP16 and session.scaler.guards_only:
        raise ConfigError(
            f"communication_precision=FP16 with mixed_precision={accelerator.mixed_precision!r}: without loss scaling "
            "small gradients would vanish in FP16; use communication_precision=BF16, or mixed_precision='fp16'."
        )
    if accelerator.distributed_type is DistributedType.FSDP:
        raise ConfigError(
            f"communication_precision={precision.value} under FSDP, which has an option of its own for what it reduces "
            "gradients in: set the reduce_dtype of mixed_precision_policy of FullyShardedDataParallelPlugin instead."
        )
    handler = accelerator.ddp_handler
    if handler is not None and handler.comm_hook != DDPCommunicationHookType.NO:
        raise ConfigError(
            f"communication_precision={precision.value} and comm_hook={handler.comm_hook.value!r} of "
            "DistributedDataParallelKwargs are two communication hooks, and a model takes one: leave one of them out."
        )
    if accelerator.num_processes > 1 and prepared_models(accelerator):
        raise AttachError(
            f"communication_precision={precision.value} after accelerator.prepare(): accelerate keeps no hold of the "
            "DistributedDataParallel that it has put around a model; call hf_amp.attach before prepare."
        )
    dtype = NumberFormat.of(precision).dtype
    prepare_model = accelerator.prepare_model

    @functools.wraps(prepare_model)
    def prepare_and_reduce(*args: Any, **kwargs: Any) -> Any:
        model = prepare_model(*args, **kwargs)
        _reduce_in(model, dtype, session)
        return model

    session.changes.set_attribute(accelerator, "prepare_model", prepare_and_reduce)


def _reduce_in(model: nn.Module, dtype: torch.dtype, session: AmpSession) -> None:
    if not isinstance(model, DistributedDataParallel):
        return
    reduction: GradientReduction | None = getattr(model, _REDUCTION, None)
    if reduction is None:
        reduction = GradientReduction()
        model.register_comm_hook(reduction, lambda reduction, bucket: reduction.average(bucket))
        setattr(model, _REDUCTION, reduction)
    session.changes.set_attribute(reduction, "dtype", dtype)


def refuse_uneven_inputs(accelerator: Accelerator, session: AmpSession) -> None:
    """Makes `join_uneven_inputs` a clear error where it would let ranks run out of batches one by one.

    A rank that has left the loop takes no part in the agreement on each step, for which the others would wait.
    """
    join_uneven_inputs = accelerator.join_uneven_inputs

    @functools.wraps(join_uneven_inputs)
    def join_even_inputs(joinables: Any, even_batches: bool | None = None) -> AbstractContextManager[None]:
        even = accelerator.even_batches if even_batches is None else even_batches
        if accelerator.multi_device and not even:
            raise AttachError(
                "join_uneven_inputs without even_batches: hf_amp's ranks agree on every step, so that all of them need "
                "the same number of batches; use even_batches=True (accelerate's default), or detach hf_amp."
            )
        context: AbstractContextManager[None] = join_uneven_inputs(joinables, even_batches)
        return context

    session.changes.set_attribute(accelerator, "join_uneven_inputs", join_even_inputs)
