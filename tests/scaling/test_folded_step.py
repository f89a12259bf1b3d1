"""Clipping folded into the optimizer step, and steps whose verdict stays on the device."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from hf_amp import AdvancedGradScaler, MixedPrecisionConfig, ScalerError
from tests.each import for_each
from tests.host_reads import count_host_reads
from tests.reference import OverflowInBackward, adamw, assert_bitwise_equal, losses, snapshot, tiny_mlp

MAX_NORM = 0.05


def folded(
    strategy: str, fused: bool, max_norm: float, overflows: set[int], steps: int = 40
) -> tuple[list[torch.Tensor], list[float], AdvancedGradScaler]:
    """A run with a folded clip; parameters and state at its end, norms, scaler."""
    model = tiny_mlp()
    scaler = AdvancedGradScaler(MixedPrecisionConfig(scaling_strategy=strategy, init_scale=1024.0), "cpu")
    optimizer, norms = adamw(model, fused), []
    for loss in losses(model, steps, overflows.__contains__):
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        norms.append(scaler.clip_grad_norm_(optimizer, max_norm))
        scaler.step(optimizer)
        scaler.update()
    scaler.flush()
    return snapshot(model, optimizer), [norm.item() for norm in norms], scaler


def unscaled_reference(
    fused: bool, max_norm: float, overflows: set[int], steps: int = 40
) -> tuple[list[torch.Tensor], list[float]]:
    """The same run in FP32 with torch's own clipping, overflowing steps left out by hand."""
    model = tiny_mlp()
    optimizer, norms = adamw(model, fused), []
    for step, loss in enumerate(losses(model, steps, lambda _: False)):
        if step in overflows:
            continue
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), max_norm).item())
        optimizer.step()
    return snapshot(model, optimizer), norms


def test_a_folded_clip_does_not_round_fp16_gradients() -> None:
    """An optimizer that is not fused would have them divided in FP16, where what scaling has saved is lost: an error, and
    nothing is touched. A fused one divides in FP32."""
    for fused in (False, True):
        weight = nn.Parameter(torch.ones(2, dtype=torch.float16))
        scaler = AdvancedGradScaler(MixedPrecisionConfig(init_scale=4096.0), "cpu")
        optimizer = torch.optim.SGD([weight], lr=1e6, fused=fused)
        scaler.scale((weight.float() * 1e-8).sum()).backward()
        scaled = weight.grad.clone()
        scaler.clip_grad_norm_(optimizer, 1.0)
        if fused:
            scaler.step(optimizer)
            assert weight.tolist() == pytest.approx([0.99, 0.99], abs=1e-3)
            continue
        with pytest.raises(ScalerError, match="cannot be unscaled in place"):
            scaler.step(optimizer)
        assert_bitwise_equal([weight.grad, weight], [scaled, torch.ones_like(weight)])


@for_each("fused", [False, True])
@for_each("strategy", ["CONSTANT", "ADAPTIVE", "PERFORMANCE_OPTIMIZED"])
@for_each("max_norm", [MAX_NORM, 1e9])
def test_folded_clip_is_the_plain_one(strategy: str, fused: bool, max_norm: float) -> None:
    """Parameters, optimizer state and norms equal a clipped FP32 run; to the last bit where nothing was clipped."""
    overflows = {3, 17}
    ours, norms, scaler = folded(strategy, fused, max_norm, overflows)
    reference, plain_norms = unscaled_reference(fused, max_norm, overflows)
    if max_norm == MAX_NORM:
        for a, b in zip(ours, reference, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-8)
    else:
        assert_bitwise_equal(ours, reference)
    clean = [norm for step, norm in enumerate(norms) if step not in overflows]
    assert clean == pytest.approx(plain_norms, rel=1e-5)
    assert (scaler.applied_steps, scaler.skipped_steps) == (38, 2)


@pytest.mark.parametrize("fused", [False, True])
def test_norm_whose_squares_overflow_is_exact(fused: bool) -> None:
    """Scaled gradients above 1e19, whose FP32 sum of squares is inf: norm and clip are those of FP64."""
    weight = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=fused)
    scaler = AdvancedGradScaler(MixedPrecisionConfig(scaling_strategy="CONSTANT", init_scale=2.0**40), "cpu")
    scaler.scale((weight * 1e10).sum()).backward()
    norm = scaler.clip_grad_norm_(optimizer, 1.0)
    scaler.step(optimizer)
    assert norm.item() == pytest.approx(2e10, rel=1e-6)
    assert weight.tolist() == pytest.approx([-0.5] * 4, rel=1e-6)


def test_such_a_norm_that_the_host_learns_of_too_late_skips_the_step() -> None:
    """A clip by it would leave nothing. The scale falls until the squares fit, and the step is the exact one."""
    weight = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
    config = MixedPrecisionConfig(scaling_strategy="PERFORMANCE_OPTIMIZED", init_scale=2.0**40)
    scaler = AdvancedGradScaler(config, "cpu")
    norms = []
    while not scaler.applied_steps:
        optimizer.zero_grad()
        scaler.scale((weight * 1e10).sum()).backward()
        norms.append(scaler.clip_grad_norm_(optimizer, 1.0).item())
        scaler.step(optimizer)
        scaler.update()
        scaler.flush()
    assert scaler.skipped_steps == 2
    assert norms == [float("inf"), float("inf"), pytest.approx(2e10)]
    assert weight.tolist() == pytest.approx([-0.5] * 4)


def test_clipping_twice_is_clipping_to_the_smaller() -> None:
    """Two folded clips in a row give what two plain ones give."""
    weights = [nn.Parameter(torch.zeros(4)) for _ in range(2)]
    optimizer = torch.optim.SGD([weights[0]], lr=1.0)
    scaler = AdvancedGradScaler(MixedPrecisionConfig(), "cpu")
    scaler.scale((weights[0] * 3).sum()).backward()
    norms = [scaler.clip_grad_norm_(optimizer, limit).item() for limit in (2.0, 1.0, 4.0)]
    scaler.step(optimizer)
    (weights[1] * 3).sum().backward()
    plain = [nn.utils.clip_grad_norm_([weights[1]], limit).item() for limit in (2.0, 1.0, 4.0)]
    torch.optim.SGD([weights[1]], lr=1.0).step()
    assert norms == pytest.approx(plain, rel=1e-5)
    torch.testing.assert_close(weights[0], weights[1])


def test_clip_after_unscale_is_the_plain_one() -> None:
    """Gradients that were unscaled before are clipped in place, as the caller sees them."""
    weight = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = AdvancedGradScaler(MixedPrecisionConfig(), "cpu")
    scaler.scale((weight * 3).sum()).backward()
    scaler.unscale_(optimizer)
    assert scaler.clip_grad_norm_(optimizer, 1.0).item() == pytest.approx(6.0)
    assert weight.grad.norm().item() == pytest.approx(1.0, rel=1e-5)


def test_accumulating_after_a_clip_is_refused() -> None:
    """More gradients on top of examined ones would escape the check: a clear error."""
    weight = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = AdvancedGradScaler(MixedPrecisionConfig(), "cpu")
    scaler.scale(weight.sum()).backward()
    scaler.clip_grad_norm_(optimizer, 1.0)
    scaler.scale(weight.sum()).backward()
    with pytest.raises(ScalerError, match="after the last backward"):
        scaler.step(optimizer)


def test_performance_mode_reads_no_host_in_the_step() -> None:
    """With a fused optimizer no operator reads the host: the verdict of the step before lies in a host buffer."""
    model = tiny_mlp()
    scaler = AdvancedGradScaler(MixedPrecisionConfig(scaling_strategy="PERFORMANCE_OPTIMIZED"), "cpu")
    optimizer = adamw(model, fused=True)
    for step, loss in enumerate(losses(model, 20, lambda step: step == 7)):
        optimizer.zero_grad()
        with count_host_reads() as reads:
            scaler.scale(loss).backward()
            scaler.clip_grad_norm_(optimizer, 1.0)
            scaler.step(optimizer)
            scaler.update()
        assert set(reads.sources) <= {"tolist"}  # of the host buffer
        assert reads.count == (step > 0)
        assert scaler.applied_steps + scaler.skipped_steps == step  # one step late
    scaler.flush()
    assert (scaler.applied_steps, scaler.skipped_steps) == (19, 1)


def test_late_verdicts_are_told_in_order_and_with_their_step() -> None:
    """Observers get every step once, in order, with its number, also the last one after a flush."""
    model, reported = tiny_mlp(), []
    scaler = AdvancedGradScaler(MixedPrecisionConfig(scaling_strategy="PERFORMANCE_OPTIMIZED"), "cpu")
    scaler.observers.append(lambda outcome, _: reported.append((outcome.attempt, outcome.applied)))
    optimizer = adamw(model, fused=True)
    for loss in losses(model, 5, lambda step: step == 2):
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert reported == [(1, True), (2, True), (3, False), (4, True)]
    scaler.flush()
    assert reported[-1] == (5, True)


def test_performance_mode_without_a_fused_optimizer_is_exact() -> None:
    """An optimizer that cannot skip by itself is decided for on the host, in time."""
    weight = nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = AdvancedGradScaler(MixedPrecisionConfig(scaling_strategy="PERFORMANCE_OPTIMIZED"), "cpu")
    scaler.scale(OverflowInBackward.apply(weight.sum())).backward()
    scaler.step(optimizer)
    assert weight.item() == 1.0
    assert scaler.skipped_steps == 1


def late_run(steps: int, new_scale_at: int | None = None) -> tuple[list[float], AdvancedGradScaler]:
    """A run whose verdicts come late, with one optimizer that skips by itself and one that does not; scales of the steps."""
    models = [tiny_mlp(), tiny_mlp()]
    scaler = AdvancedGradScaler(MixedPrecisionConfig(scaling_strategy="PERFORMANCE_OPTIMIZED", init_scale=256.0), "cpu")
    optimizers = [adamw(model, fused) for model, fused in zip(models, (True, False), strict=True)]
    scales = []
    both = zip(losses(models[0], steps, {3}.__contains__), losses(models[1], steps, {5}.__contains__), strict=True)
    for step, pair in enumerate(both):
        for optimizer in optimizers:
            optimizer.zero_grad()
        scales.append(scaler.get_scale())
        for loss in pair:
            scaler.scale(loss).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update(*([64.0] if step == new_scale_at else []))
    scaler.flush()
    return scales, scaler


def test_the_scale_falls_at_once_although_the_verdict_is_late() -> None:
    """Whichever of two optimizers has overflowed: the backward after the skipped step has the lower scale, and it alone falls."""
    scales, scaler = late_run(9)
    assert (scaler.applied_steps, scaler.skipped_steps) == (16, 2)
    assert [index for index, (a, b) in enumerate(itertools.pairwise(scales)) if b < a / 16] == [3, 5]


def test_a_scale_that_is_set_while_a_verdict_is_late_stays() -> None:
    """Also where that step was skipped."""
    for at in (2, 3):
        scales, scaler = late_run(at + 2, new_scale_at=at)
        assert scales[at + 1] == 64.0
        assert scaler.applied_steps + scaler.skipped_steps == 2 * (at + 2)
