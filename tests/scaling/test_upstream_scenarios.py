"""Scenarios that the test suites of other scalers hold, rebuilt on ours."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from hf_amp import AdvancedGradScaler, MixedPrecisionConfig
from tests.each import for_each
from tests.reference import OverflowInBackward, tiny_mlp


def scaler_with(**options: object) -> AdvancedGradScaler:
    return AdvancedGradScaler(MixedPrecisionConfig(**options), "cpu")


PYTORCH = {"init_scale": 4.0, "growth_factor": 2.0, "backoff_factor": 0.25, "growth_interval": 2}


def test_pytorch_scale_trajectory() -> None:
    """PyTorch: scale 4, growth 2, backoff 0.25, interval 2."""
    scaler, weight = scaler_with(**PYTORCH), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    scales = []
    for overflow in (False, False, True, False, True, False, False):
        optimizer.zero_grad()
        loss = weight.sum()
        scaler.scale(OverflowInBackward.apply(loss) if overflow else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    assert scales == [4.0, 8.0, 2.0, 2.0, 0.5, 0.5, 1.0]


@for_each("bad", [math.inf, -math.inf, math.nan])
@for_each("dtype", [torch.float32, torch.float64, torch.bfloat16])
@for_each("fused", [False, True])
def test_pytorch_inf_in_each_gradient_in_turn(bad: float, dtype: torch.dtype, fused: bool) -> None:
    """PyTorch: one bad element in any of the gradients, of mixed dtypes, skips the step and backs off."""
    for non_finite in range(3):
        weights = [nn.Parameter(torch.ones(4, dtype=d)) for d in (torch.float32, dtype, torch.float32)]
        optimizer, scaler = torch.optim.SGD(weights, lr=0.5, fused=fused), scaler_with(**PYTORCH)
        scaler.scale(sum(weight.float().sum() for weight in weights)).backward()
        weights[non_finite].grad[2] = bad
        scaler.step(optimizer)
        scaler.update()
        assert all(weight.eq(1).all() for weight in weights)
        assert scaler.get_scale() == 1.0
        assert (scaler.last_outcome.inf_elements, scaler.last_outcome.nan_elements) == (
            (0, 1) if math.isnan(bad) else (1, 0)
        )


def test_pytorch_growth_never_reaches_inf() -> None:
    """PyTorch: init 1e38 with growth 16 stays where it is instead of becoming inf."""
    scaler, weight = (scaler_with(init_scale=1e38, growth_factor=16.0, growth_interval=1), nn.Parameter(torch.zeros(1)))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    scaler.scale(weight.sum()).backward()
    weight.grad.zero_()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == pytest.approx(1e38)


def test_pytorch_sparse_duplicates() -> None:
    """PyTorch: finite duplicates apply, and duplicates whose sum overflows skip."""
    for values, applied in (([640.0, 64.0], True), ([3e38, 3e38], False)):
        weight = nn.Parameter(torch.zeros(3))
        optimizer, scaler = torch.optim.SGD([weight], lr=1.0), scaler_with(init_scale=2.0)
        scaler.scale(weight.sum()).backward()
        indices, elements = torch.tensor([[1, 1]]), torch.tensor(values)
        weight.grad = torch.sparse_coo_tensor(indices, elements, (3,), check_invariants=True)
        scaler.step(optimizer)
        assert scaler.last_outcome.applied is applied
        assert weight.tolist() == ([0.0, -352.0, 0.0] if applied else [0.0, 0.0, 0.0])


def train(scaled: bool, kind: str, fused: bool) -> list[Tensor]:
    """A control run (no scaler) or a scaled one, with clipping, gradient penalty or accumulation."""
    model = tiny_mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    scaler = AdvancedGradScaler(MixedPrecisionConfig(init_scale=1024.0, enabled=scaled), "cpu")
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for _ in range(2 if kind == "accumulation" else 1):
            loss = model(torch.randn(6, 4, generator=generator)).square().mean()
            if kind == "penalty":
                inputs = list(model.parameters())
                gradients = torch.autograd.grad(scaler.scale(loss), inputs, create_graph=True)
                loss = loss + sum(g.square().sum() for g in gradients) / scaler.get_scale() ** 2
            scaler.scale(loss).backward()
        if kind == "clipping":
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


@for_each("kind", ["plain", "clipping", "penalty", "accumulation"])
@for_each("fused", [False, True])
def test_pytorch_control_run_equals_scaled_run(kind: str, fused: bool) -> None:
    """PyTorch: scaling by a power of two changes nothing about what is learned."""
    for a, b in zip(train(False, kind, fused), train(True, kind, fused), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_pytorch_two_models_two_optimizers_only_the_poisoned_one_skips() -> None:
    """PyTorch: of two optimizers under one scaler only the one with an inf is skipped, and the scale backs off once."""
    models = [nn.Linear(2, 1, bias=False) for _ in range(2)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=1.0) for model in models]
    before = [model.weight.detach().clone() for model in models]
    scaler = scaler_with(**PYTORCH)
    x = torch.ones(1, 2)
    scaler.scale(models[0](x).sum() + OverflowInBackward.apply(models[1](x).sum())).backward()
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    assert torch.equal(models[0].weight, before[0] - 1)
    assert torch.equal(models[1].weight, before[1])
    assert scaler.get_scale() == 1.0


def test_keras_skipped_step_halves_and_starts_counting_anew() -> None:
    """Keras: losses are scaled by 2^15 first; growth after N clean steps in a row; an overflow halves, and skips."""
    scaler, weight = scaler_with(init_scale=2.0**15, growth_interval=3), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scales, weights = [], []
    assert scaler.scale(torch.tensor(3.0)).item() == 3.0 * 2**15
    for overflow in (False, False, True, False, False, False):
        optimizer.zero_grad()
        loss = weight.sum()
        scaler.scale(OverflowInBackward.apply(loss) if overflow else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(math.log2(scaler.get_scale()))
        weights.append(weight.item())
    assert scales == [15, 15, 14, 14, 14, 15]
    assert weights == [-1, -2, -2, -3, -4, -5]


def test_optax_state_after_skips() -> None:
    """optax: however many steps in a row are not finite, none of them is applied (apply_if_finite gives in after n)."""
    scaler, weight = scaler_with(), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.9)
    for _ in range(50):
        optimizer.zero_grad()
        scaler.scale((weight * math.nan).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert weight.item() == 1.0
    assert not optimizer.state
    assert scaler.skipped_steps == 50


def test_popart_scale_is_constant_within_an_accumulation_window() -> None:
    """PopART: micro-batches of one window share one scale; it changes between windows only."""
    scaler, weight = scaler_with(growth_interval=1, init_scale=2.0), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    seen = []
    for _ in range(3):
        window = []
        for _ in range(4):
            window.append(scaler.scale(torch.ones(())).item())
            scaler.scale(weight.sum()).backward()
        seen.append(set(window))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert seen == [{2.0}, {4.0}, {8.0}]
