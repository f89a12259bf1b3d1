"""Another thread that calls the model, as a server does, is left alone and not blamed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hf_amp
from hf_amp import AmpSession, Cause, EventKind, PrecisionMode
from hf_amp.fallback.module_precision import CurrentPrecision, ForwardContext, PrecisionEntry
from hf_amp.fallback.operators import OperatorTrace

pytestmark = pytest.mark.usefixtures("fresh_accelerator_state")


class Slow(nn.Module):
    """Long enough in its forward pass that two threads are in it at once, and longer with gradients than without."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        time.sleep(0.005 if torch.is_grad_enabled() else 0.001)
        return y


@contextmanager
def called_meanwhile(model: nn.Module, batch: Tensor, grad: bool) -> Iterator[list[Tensor]]:
    """Another thread calls `model` on `batch` all the time; gives what it returned, and raises what was raised there."""
    outputs: list[Tensor] = []
    errors: list[Exception] = []
    is_over = threading.Event()

    def serve() -> None:
        with torch.set_grad_enabled(grad):
            while not is_over.is_set() and not errors:
                try:
                    outputs.append(model(batch).detach())
                except Exception as error:
                    errors.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield outputs
    finally:
        is_over.set()
        thread.join()
    if errors:
        raise errors[0]


def train(session: AmpSession, accelerator: Accelerator, model: nn.Module, optimizer: object, steps: int) -> None:
    """Every fourth step leaves the range of FP16."""
    for step in range(steps):
        loss = model(torch.ones(2, 4) * (1e6 if step % 4 == 3 else 1)).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("grad", [False, True])
def test_a_replay_leaves_other_threads_alone(grad: bool) -> None:
    """Its hooks act in their own thread: no error in the other, whose outputs are all the same."""
    accelerator = Accelerator(cpu=True, mixed_precision="fp16")
    session = hf_amp.attach(accelerator, automatic_fallback=False)
    model = Slow()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.0))
    with called_meanwhile(model, torch.ones(1, 4), grad) as outputs:
        train(session, accelerator, model, optimizer, 24)
    assert len(outputs) > 24
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    skips = [event for event in session.events if event.kind is EventKind.STEP_SKIPPED]
    assert [(e.step, e.cause, e.modules) for e in skips] == [
        (step, Cause.ACTIVATION, ("layer",)) for step in range(4, 25, 4)
    ]


def test_what_another_thread_calls_the_model_on_is_not_blamed() -> None:
    """NaN in its batches is not that of the step, although gradients are on there."""
    accelerator = Accelerator(cpu=True, mixed_precision="fp16")
    session = hf_amp.attach(accelerator, automatic_fallback=False)
    model = Slow()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.0))
    with called_meanwhile(model, torch.full((1, 4), torch.nan), grad=True):
        train(session, accelerator, model, optimizer, 8)
    causes = [event.cause for event in session.events if event.kind is EventKind.STEP_SKIPPED]
    assert causes == [Cause.ACTIVATION] * 2


class RootOfItself(nn.Module):
    """A finite value with an infinite derivative, in a module that is checkpointed."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (x - x.detach()).abs().sqrt()


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(4, 4), RootOfItself(), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.block, self.first(x), use_reentrant=True))


def test_a_backward_in_a_thread_of_its_own_is_watched() -> None:
    """As a GPU's is: what reentrant checkpointing recomputes there says which operator, and runs in what the replay runs in."""
    model = Checkpointed()
    trace = OperatorTrace(CurrentPrecision(PrecisionEntry("cpu", True), PrecisionMode.FP32), forward=False)
    suspensions: dict[str, int] = {}
    model.block.register_forward_hook(lambda *_: suspensions.update(backward=ForwardContext.suspensions()))
    with ForwardContext.suspended(), trace.watching(model):
        loss = model(torch.randn(2, 4)).sum()
        trace.repeats_backward = True
        trace.watch_backward([loss])
        of_another = threading.Thread(target=lambda: suspensions.update(elsewhere=ForwardContext.suspensions()))
        for thread in (threading.Thread(target=loss.backward), of_another):
            thread.start()
            thread.join()
    assert trace.in_backward is not None
    assert (trace.in_backward.module, trace.in_backward.what.split()[0]) == ("block", "SqrtBackward0,")
    assert suspensions == {"backward": 1, "elsewhere": 0}
    assert ForwardContext.suspensions() == 0
