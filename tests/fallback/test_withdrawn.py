"""A wider plan whose first forward pass raises is withdrawn, and the pass is run again; the run goes on."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import hf_amp
from hf_amp import AmpSession, Cause, EventKind, MixedPrecisionConfig, PrecisionMode
from hf_amp.fallback import controller
from hf_amp.fallback.diagnosis import Diagnosis
from hf_amp.fallback.plan import PrecisionPlan

pytestmark = pytest.mark.usefixtures("fresh_accelerator_state", "nothing_compiled")


class HalfAttention(nn.Module):
    """Takes half precision only, as FlashAttention does."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.projection, self.error = nn.Linear(8, 8), error

    def forward(self, x: Tensor) -> Tensor:
        values = self.projection(x)
        if values.dtype == torch.float32:
            raise self.error
        return torch.nn.functional.scaled_dot_product_attention(values[None], values[None], values[None])[0]


class Model(nn.Module):
    """Its head overflows FP16 where `gain` is large."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.attention, self.head, self.gain = HalfAttention(error), nn.Linear(8, 4), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x) * self.gain).float().square().mean()


ERRORS = [
    RuntimeError("FlashAttention only support fp16 and bf16 data type"),
    torch.OutOfMemoryError("CUDA out of memory"),
]


@pytest.mark.parametrize("error", ERRORS, ids=["no kernel", "no memory"])
@pytest.mark.parametrize("default", [PrecisionMode.MIXED, PrecisionMode.FP32])
def test_a_plan_whose_first_forward_raises_is_withdrawn(error: Exception, default: PrecisionMode) -> None:
    """A module in FP32, or the whole model: the same pass runs under the plan before, and the event says what was raised."""
    torch.manual_seed(0)
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    session = hf_amp.attach(accelerator, MixedPrecisionConfig(emulate=False, init_scale=8.0))
    plain = Model(error)
    model, optimizer = accelerator.prepare(plain, torch.optim.SGD(plain.parameters(), lr=0.01))

    def step() -> None:
        accelerator.backward(model(torch.randn(4, 8)))
        optimizer.step()
        optimizer.zero_grad()

    step()
    widen(session, default)
    step()
    assert session.plan == PrecisionPlan(PrecisionMode.MIXED)
    assert session.metrics()["applied_steps"] == 2
    (event,) = (e for e in session.events if e.kind is EventKind.PRECISION_CHANGED)
    assert (
        "not enough memory" if isinstance(error, torch.OutOfMemoryError) else "FlashAttention only"
    ) in event.message
    assert "forward" not in vars(plain) or plain.forward.__name__ != "tried"
    step()
    assert len([e for e in session.events if e.kind is EventKind.PRECISION_CHANGED]) == 1


def widen(session: AmpSession, default: PrecisionMode) -> None:
    """What the controller does of itself after a skip that no scale cures."""
    cause = Cause.ACTIVATION if default is PrecisionMode.MIXED else Cause.ROUNDING
    modules = ("attention.projection",) if default is PrecisionMode.MIXED else ()
    diagnosis = Diagnosis(cause, "made up", modules)
    assert session._fallback.after_skipped(diagnosis, 1.0, 8.0) is not None
    assert session.plan.default is default


def test_an_error_that_comes_again_is_the_users() -> None:
    """Where the former plan raises too, the exception goes on, and `recover` knows what it was."""
    session_error = torch.OutOfMemoryError("CUDA out of memory")
    plain = Model(session_error)
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    session = hf_amp.attach(accelerator, MixedPrecisionConfig(emulate=False, init_scale=8.0))
    model = accelerator.prepare(plain)
    model(torch.randn(4, 8))
    widen(session, PrecisionMode.FP32)
    plain.attention.projection.register_forward_hook(lambda module, inputs, output: output.float())
    with pytest.raises(torch.OutOfMemoryError) as caught:
        model(torch.randn(4, 8))
    assert session.recover(caught.value)
    assert session.plan == PrecisionPlan(PrecisionMode.MIXED)


def test_a_lack_of_memory_is_said_before_the_whole_model_is_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what a step took, and what is free; nothing where there is room, or the device does not say."""
    messages = []
    for room in (None, (4 * 2**30, 2**30), (2**30, 3 * 2**30)):
        monkeypatch.setattr(controller, "room_on", lambda device, room=room: room)
        session = hf_amp.attach(Accelerator(mixed_precision="fp16", cpu=True), MixedPrecisionConfig(init_scale=8.0))
        session._fallback.runner.register_model(Model(ERRORS[0]))
        change = session._fallback.after_skipped(Diagnosis(Cause.ROUNDING, "made up"), 1.0, 8.0)
        messages.append(change.message.partition(" Memory may not suffice: ")[2])
    assert messages[:2] == ["", ""]
    assert (
        messages[2] == "a step has taken 3.0 GiB so far, a wider one takes up to twice as much, and 1.0 GiB are free."
    )
