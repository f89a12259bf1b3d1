"""Figures by module are those of the modules, and cost nothing in the steps between."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import hf_amp
from hf_amp import MixedPrecisionConfig
from tests.each import for_each
from tests.host_reads import count_host_reads

INTERVAL = 3
pytestmark = pytest.mark.usefixtures("fresh_accelerator_state")


class Net(nn.Module):
    """Two layers, the second of which is called twice, and one whose gradients are tiny."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 8)
        self.twice = nn.Linear(8, 8)
        self.faint = nn.Linear(8, 1)
        with torch.no_grad():
            self.faint.weight.mul_(1e-3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.twice(self.twice(self.first(x)))
        return self.faint(hidden).square().mean() + hidden.square().mean()


def run(steps: int, fused: bool = False, precision: str = "fp16", clip: bool = True, **options: Any) -> Any:
    """A raw Accelerate loop; yields after every step the session, the model, and what the step's truth was."""
    accelerator = Accelerator(mixed_precision=precision, cpu=True)
    options = {"init_scale": 1024.0, **options}
    config = MixedPrecisionConfig(monitor_modules=True, monitoring_interval=INTERVAL, **options)
    session = hf_amp.attach(accelerator, config)
    model = Net()
    prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused))
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randn(4, 8, generator=generator)
        accelerator.backward(prepared(x))
        scaled = {name: p.grad.clone() for name, p in model.named_parameters()}
        if clip:
            accelerator.clip_grad_norm_(prepared.parameters(), 1e-3)
        optimizer.step()
        optimizer.zero_grad()
        yield session, model, scaled


def headrooms(scaled: dict[str, Tensor]) -> dict[str, float]:
    """The slow, obvious way: of the worst parameter of each module, before clipping."""
    found: dict[str, float] = {}
    for name, gradient in scaled.items():
        module = name.rpartition(".")[0]
        bits = math.log2(65504 / float(gradient.abs().max()))
        found[module] = min(bits, found.get(module, math.inf))
    return found


@for_each(
    "options",
    [{}, {"fused": True}, {"clip": False}, {"fold_clipping": True, "fused": True}, {"scaling_strategy": "ADAPTIVE"}],
)
def test_headroom_is_that_of_the_scaled_gradients_before_clipping(options: dict[str, Any]) -> None:
    """Whichever way gradients are treated: unscaled in place and clipped, folded, or neither."""
    for step, (session, _, scaled) in enumerate(run(2 * INTERVAL, **options)):
        if step % INTERVAL == 0:
            expected = headrooms(scaled)
        assert session.module_metrics()["module_headroom_bits"] == pytest.approx(expected, rel=1e-5)


def underflows(scaled: dict[str, Tensor]) -> dict[str, float]:
    """Share of subnormal elements, of the worst parameter of each module, before clipping."""
    found: dict[str, float] = {}
    for name, gradient in scaled.items():
        module = name.rpartition(".")[0]
        share = float(((gradient != 0) & (gradient.abs() < 2.0**-14)).float().mean())
        found[module] = max(share, found.get(module, 0.0))
    return found


@for_each("options", [{}, {"fused": True}, {"fold_clipping": True, "fused": True}])
def test_modules_whose_gradients_underflow_are_named(options: dict[str, Any]) -> None:
    """With a scale of 2^-5, at which some of a module's gradient is below FP16's normal range: the share of each module."""
    for step, (session, _, scaled) in enumerate(run(2 * INTERVAL, init_scale=2.0**-5, **options)):
        if step % INTERVAL == 0:
            expected = underflows(scaled)
        assert session.module_metrics()["module_underflow_fraction"] == pytest.approx(expected)
    assert len(set(expected.values())) > 1


def test_a_lora_that_has_not_begun_to_learn_does_not_underflow() -> None:
    """Its B is zero at the start, and so is the gradient of its A: the format has flushed nothing of it."""
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["twice"], modules_to_save=["first"])
    model = get_peft_model(Net(), config)  # type: ignore[arg-type]
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    session = hf_amp.attach(accelerator, MixedPrecisionConfig(monitor_modules=True, init_scale=1024.0))
    prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    accelerator.backward(prepared(torch.randn(4, 8)))
    optimizer.step()
    assert set(session.module_metrics()["module_underflow_fraction"]) == {
        "base_model.model.first.modules_to_save.default",
        "base_model.model.twice.lora_B.default",
    }
    assert session.metrics()["underflow_fraction"] < 0.05


def test_a_deferred_verdict_brings_them_a_step_later() -> None:
    """In PERFORMANCE_OPTIMIZED with a fused optimizer nothing is read in the step, and the figures come all the same."""
    options = {"fused": True, "scaling_strategy": "PERFORMANCE_OPTIMIZED"}
    steps = list(run(INTERVAL + 2, **options))
    session, _, _ = steps[-1]
    truth = [headrooms(scaled) for _, _, scaled in steps]
    assert session.module_metrics()["module_headroom_bits"] == pytest.approx(truth[INTERVAL], rel=1e-5)


def test_activations_are_the_largest_of_all_calls() -> None:
    """A module that runs twice in a step tells the larger one; only modules without children tell."""
    session, _, _ = next(run(1))
    figures = session.module_metrics()["module_activation_amax"]
    assert set(figures) == {"first", "twice", "faint"}
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    fresh = Net()
    first = fresh.first(x)
    once = fresh.twice(first)
    again = fresh.twice(once)
    seen = {"first": first, "twice": torch.cat([once, again]), "faint": fresh.faint(again)}
    for name, values in seen.items():
        assert figures[name] == pytest.approx(float(values.detach().abs().max()), rel=1e-2), name


def test_between_close_looks_there_is_no_hook() -> None:
    """Hooks are there for the forward passes of every third step only; detach takes them away."""
    steps = [(session, model, len(model.first._forward_hooks)) for session, model, _ in run(2 * INTERVAL)]
    session, model, _ = steps[-1]
    hooks = [count for _, _, count in steps]
    others = min(hooks)
    assert [count - others for count in hooks] == [0, 0, 1, 0, 0, 1]  # after a step, for the next
    session.detach()
    assert not model.first._forward_hooks


def test_detach_leaves_the_passengers_of_others() -> None:
    """What somebody else has read along with every step goes on being read."""
    session, _, _ = next(run(1))
    (own,) = session.scaler.step_hooks

    def mine(record: Any, optimizer: Any) -> dict[str, Tensor]:
        return {}

    session.scaler.step_hooks.append(mine)
    session.detach()
    assert own not in session.scaler.step_hooks
    assert mine in session.scaler.step_hooks


def test_it_adds_no_host_read() -> None:
    """A step that is looked at closely reads the host once, like every other."""
    counts = []
    loop = run(2 * INTERVAL, clip=False, fused=True)  # others read their step counters
    for _ in range(2 * INTERVAL):
        with count_host_reads() as reads:
            next(loop)
        counts.append(reads.count)
    assert counts == [1] * 2 * INTERVAL


def test_evaluation_does_not_count() -> None:
    """A forward pass without gradients before the step's own leaves no trace."""
    loop = run(INTERVAL + 1)
    for _ in range(INTERVAL):
        _, model, _ = next(loop)
    with torch.no_grad():
        model(torch.full((4, 8), 1e4))
    session, _, _ = next(loop)
    assert session.module_metrics()["module_activation_amax"]["first"] < 100


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_without_a_scale_only_activations_are_told(precision: str) -> None:
    """Headroom and underflow in FP16 mean nothing for gradients that are not scaled into it."""
    for session, _, _ in run(1, precision=precision):
        assert set(session.module_metrics()) == {"module_activation_amax"}


def test_off_it_is_off() -> None:
    """By default nothing rides along and no module has figures."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    session = hf_amp.attach(accelerator)
    assert session.scaler.step_hooks == []
    assert session.module_metrics() == {}
