"""The scaler on a GPU: the stock one's steps, no waiting where none is promised, and models on several devices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_amp import AdvancedGradScaler, MixedPrecisionConfig, ScalerError
from tests.each import for_each
from tests.host_reads import count_synchronisations
from tests.reference import OverflowInBackward, adamw, assert_bitwise_equal, snapshot, tiny_mlp

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
STEPS, OVERFLOWS = 30, (3, 11, 12)


def loss_of(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step)).to(CUDA)
    loss = model(x).square().mean()
    return OverflowInBackward.apply(loss) if step in OVERFLOWS else loss


@pytest.mark.parametrize("clip", [None, 0.05], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_trajectory_is_the_stock_scalers(fused: bool, clip: float | None) -> None:
    """DYNAMIC at stock settings: same scale, parameters and AdamW state to the last bit after every step."""
    scalers = [torch.amp.GradScaler("cuda"), AdvancedGradScaler(MixedPrecisionConfig(), "cuda")]
    models = [tiny_mlp().to(CUDA) for _ in scalers]
    optimizers = [adamw(model, fused) for model in models]
    for step in range(STEPS):
        for scaler, model, optimizer in zip(scalers, models, optimizers, strict=True):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            if clip is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        assert_bitwise_equal(*map(snapshot, models, optimizers))
    assert scalers[1].skipped_steps == len(OVERFLOWS)


@for_each("strategy", ["DYNAMIC", "ADAPTIVE", "PERFORMANCE_OPTIMIZED"])
def test_a_step_waits_as_often_as_is_promised(strategy: str) -> None:
    """Fused, everything on, statistics in every step: once, or never in PERFORMANCE_OPTIMIZED; and skips are skips."""
    config = MixedPrecisionConfig(scaling_strategy=strategy, init_scale=1024.0, monitoring_interval=1)
    scaler, model = AdvancedGradScaler(config, "cuda"), tiny_mlp().to(CUDA)
    optimizer, moved = adamw(model, fused=True), []
    for step in range(STEPS):
        loss = loss_of(model, step)
        before = snapshot(model, optimizer)[:4]
        with count_synchronisations() as waits:
            scaler.scale(loss).backward()
            scaler.clip_grad_norm_(optimizer, 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        if step > 0 and step not in OVERFLOWS:  # the first one makes the optimizer's state
            assert waits.count == (0 if strategy == "PERFORMANCE_OPTIMIZED" else 1), waits.sources
        moved.append(not all(map(torch.equal, before, snapshot(model, optimizer)[:4])))
    assert [step for step in range(STEPS) if not moved[step]] == list(OVERFLOWS)
    scaler.flush()
    assert (scaler.applied_steps, scaler.skipped_steps) == (STEPS - len(OVERFLOWS), len(OVERFLOWS))
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("mode", ["MIXED", "BF16"])
def test_a_scale_in_a_cuda_graph_is_an_error(mode: str) -> None:
    """A replay would not follow the scale. Where there is none (BF16) a loss may be captured."""
    scaler = AdvancedGradScaler(MixedPrecisionConfig(precision_mode=mode), "cuda")
    weight, graph = nn.Parameter(torch.ones(3, device=CUDA)), torch.cuda.CUDAGraph()
    weight.sum()  # loads what a sum needs
    refused = pytest.raises(ScalerError, match="outside of the graph") if mode == "MIXED" else nullcontext()
    with refused, torch.cuda.graph(graph):
        scaler.scale(weight.sum())


def test_a_scale_from_the_host_is_not_waited_for() -> None:
    """`update(new_scale)` with a tensor on the CPU."""
    scaler, weight = AdvancedGradScaler(device="cuda"), nn.Parameter(torch.ones(3, device=CUDA))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler.scale(weight.sum()).backward()
    scaler.step(optimizer)
    with count_synchronisations() as waits:
        scaler.update(torch.tensor(8.0))
    assert waits.sources == []
    assert scaler.get_scale() == 8.0


@pytest.fixture
def deterministic_mode() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic_mode")
@pytest.mark.parametrize("strategy", ["DYNAMIC", "ADAPTIVE", "PERFORMANCE_OPTIMIZED"])
def test_deterministic_mode_and_a_default_device(strategy: str) -> None:
    """A step with statistics is no error with `full_determinism`, nor after `torch.set_default_device`."""
    config = MixedPrecisionConfig(scaling_strategy=strategy, init_scale=1024.0, monitoring_interval=1)
    scaler, weight = AdvancedGradScaler(config, "cuda"), nn.Parameter(torch.randn(5000, device=CUDA))
    optimizer = torch.optim.SGD([weight], lr=0.1, fused=True)
    with CUDA:
        for factor in (1.0, torch.inf, 1.0):
            optimizer.zero_grad()
            scaler.scale((weight * factor).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        scaler.flush()
    assert (scaler.applied_steps, scaler.skipped_steps) == (2, 1)


class Split(nn.Module):
    """A network whose halves lie on two devices, and whose loss lies on a third one or on one of theirs."""

    def __init__(self, first: str, second: str, loss: str) -> None:
        super().__init__()
        layers = tiny_mlp()
        self.first, self.second, self.loss = layers[0].to(first), layers[2].to(second), loss

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.to(self.first.weight.device)).tanh()
        return self.second(x.to(self.second.weight.device)).square().mean().to(self.loss)


def trained(model: Split, scaler: Any, fused: bool) -> list[Tensor]:
    """Parameters after 20 steps, on the CPU; the gradient of one half alone is inf in some."""
    optimizer = adamw(model, fused=True) if fused else torch.optim.SGD(model.parameters(), lr=0.1)
    overflowing = {4: model.first, 9: model.second}
    for step in range(20):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = model(x)
        if scaler is None:
            if step not in overflowing:
                loss.backward()
                optimizer.step()
            continue
        scaler.scale(loss).backward()
        if step in overflowing:
            overflowing[step].weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
    return [p.detach().cpu() for p in model.parameters()]


@for_each("fused", [False, True])
@for_each("strategy", ["DYNAMIC", "ADAPTIVE", "PERFORMANCE_OPTIMIZED"])
@for_each("loss", ["cpu", "cuda"])
@pytest.mark.parametrize("halves", [("cpu", "cuda"), ("cuda", "cpu"), ("cuda:0", "cuda:1")], ids="-".join)
def test_a_model_on_two_devices(halves: tuple[str, str], loss: str, strategy: str, fused: bool) -> None:
    """An overflow on either device skips the step on both; the rest is the run without a scaler that leaves it out."""
    if "cuda:1" in halves and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    config = MixedPrecisionConfig(scaling_strategy=strategy, init_scale=256.0, monitoring_interval=1)
    scaler = AdvancedGradScaler(config, loss)
    found, expected = trained(Split(*halves, loss), scaler, fused), trained(Split(*halves, loss), None, fused)
    scaler.flush()
    assert (scaler.applied_steps, scaler.skipped_steps) == (18, 2)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
