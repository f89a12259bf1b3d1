"""Steps that a loop leaves out after `unscale_` or a clip, and batches whose gradients it throws away."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from hf_amp import AdvancedGradScaler, MixedPrecisionConfig, ScalerError
from tests.each import for_each
from tests.reference import OverflowInBackward, assert_bitwise_equal, snapshot, tiny_mlp

BATCHES = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0))


def scaler_with(**options: Any) -> AdvancedGradScaler:
    return AdvancedGradScaler(MixedPrecisionConfig(init_scale=256.0, **options), "cpu")


def trained(scaler: torch.amp.GradScaler, left_out: tuple[int, ...], **clearing: bool) -> list[torch.Tensor]:
    """Six steps, of which some are left out after `unscale_` and a clip; parameters and optimizer state after them.

    A stock scaler, which would refuse the step after, gets the batches of the others alone.
    """
    model = tiny_mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step, batch in enumerate(BATCHES):
        if step in left_out and type(scaler) is torch.amp.GradScaler:
            continue
        scaler.scale(model(batch).square().mean()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        if step not in left_out:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad(**clearing)
    return snapshot(model, optimizer)


@for_each("set_to_none", [True, False])
@for_each("left_out", [(0,), (2,), (2, 3), (5,)])
def test_zero_grad_begins_anew(set_to_none: bool, left_out: tuple[int, ...]) -> None:
    """Bit for bit what the stock class does in a loop that never saw those batches; no step, and nothing else, is lost."""
    ours, stock = scaler_with(), torch.amp.GradScaler("cpu", init_scale=256.0)
    assert_bitwise_equal(
        trained(ours, left_out, set_to_none=set_to_none), trained(stock, left_out, set_to_none=set_to_none)
    )
    assert (ours.applied_steps, ours.skipped_steps) == (6 - len(left_out), 0)
    assert ours.get_scale() == stock.get_scale()


def test_a_clip_that_divides_later_can_be_left_out() -> None:
    """The scaler's own `clip_grad_norm_`, then zero_grad: the next step is the one that a fresh scaler takes."""
    steps = []
    for leaves_out in (True, False):
        scaler, model = scaler_with(), tiny_mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for batch in BATCHES[0 if leaves_out else 1 : 2]:
            optimizer.zero_grad()
            scaler.scale(model(batch).square().mean()).backward()
            scaler.clip_grad_norm_(optimizer, 0.1)
        scaler.step(optimizer)
        steps.append(snapshot(model, optimizer))
    assert_bitwise_equal(*steps)


def test_loading_a_state_begins_anew() -> None:
    """`unscale_`, `load_state_dict`, and the next backward: no error, and the scale is the loaded one."""
    scaler, parameter = scaler_with(), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scaler.scale(parameter.sum()).backward()
    scaler.unscale_(optimizer)
    scaler.load_state_dict({**scaler.state_dict(), "scale": 16.0})
    parameter.grad.zero_()
    scaler.scale(parameter.sum()).backward()
    scaler.unscale_(optimizer)
    assert parameter.grad.item() == 1.0
    assert scaler.get_scale() == 16.0


def test_more_gradients_on_top_of_divided_ones_stay_an_error() -> None:
    """Where nothing was cleared, what is there has two scales."""
    scaler, parameter = scaler_with(), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scaler.scale(parameter.sum()).backward()
    scaler.unscale_(optimizer)
    scaler.scale(parameter.sum()).backward()
    with pytest.raises(ScalerError, match="zero_grad"):
        scaler.step(optimizer)


@for_each("unscales", [True, False])
def test_a_batch_that_was_thrown_away_is_not_of_the_next_step(unscales: bool) -> None:
    """Its NaN loss is neither counted nor why the next step, whose gradients overflow, is skipped."""
    scaler, parameter = scaler_with(), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scaler.scale(parameter.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    scaler.scale(parameter.sum() * torch.nan).backward()
    if unscales:
        scaler.unscale_(optimizer)
    optimizer.zero_grad()
    scaler.scale(OverflowInBackward.apply(parameter.sum())).backward()
    scaler.step(optimizer)
    outcome = scaler.last_outcome
    assert (outcome.applied, outcome.loss_finite, outcome.losses, outcome.non_finite_losses) == (False, True, 1, 0)


def test_losses_that_are_scaled_before_any_backward_are_all_of_the_step() -> None:
    """Two losses, scaled first and then run backward one after the other: two, of which one is not finite."""
    scaler, parameter = scaler_with(), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scaler.watch(optimizer)
    scaled = [scaler.scale(parameter.sum() * factor) for factor in (torch.nan, 1.0)]
    for loss in scaled:
        loss.backward()
    scaler.step(optimizer)
    assert (scaler.last_outcome.losses, scaler.last_outcome.non_finite_losses) == (2, 1)


# ---- closures, where nothing is scaled --------------------------------------------------------------------------


def fitted(scaler: AdvancedGradScaler | None, bad_call: int | None, **options: Any) -> tuple[list[float], list[Any]]:
    """Three steps of LBFGS on a line, through `scaler` or alone; the losses, and the parameters before each step and after all."""
    model = nn.Linear(4, 1)
    nn.init.constant_(model.weight, 0.5)
    nn.init.zeros_(model.bias)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4, **options)
    losses: list[float] = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(BATCHES[0]) - 1).square().mean()
        losses.append(loss.item())
        loss = loss * torch.nan if len(losses) == bad_call else loss
        loss.backward()
        return loss

    seen = []
    for _ in range(3):
        seen.append(copy.deepcopy(list(model.parameters())))
        if scaler is None:
            optimizer.step(closure)
        else:
            scaler.step(optimizer, closure)
            scaler.update()
    return losses, [*seen, list(model.parameters())]


@for_each("precision", ["FP32", "BF16"])
@for_each("options", [{}, {"line_search_fn": "strong_wolfe"}])
def test_lbfgs_runs_where_nothing_is_scaled(precision: str, options: dict[str, Any]) -> None:
    """The same calls of the closure, and the same parameters to the bit, as without a scaler."""
    scaler = scaler_with(precision_mode=precision)
    losses, seen = fitted(scaler, None, **options)
    expected, alone = fitted(None, None, **options)
    assert losses == expected
    assert_bitwise_equal([p for ps in seen for p in ps], [p for ps in alone for p in ps])
    assert (scaler.applied_steps, scaler.skipped_steps) == (3, 0)


@for_each("bad_call", [1, 3, 6])
def test_a_non_finite_closure_skips_the_step(bad_call: int) -> None:
    """At the first call, inside of a step, or in a later one: parameters as before it, counted, and the next steps go on."""
    scaler = scaler_with(precision_mode="FP32")
    outcomes: list[Any] = []
    scaler.observers.append(lambda outcome, optimizer: outcomes.append(outcome))
    losses, seen = fitted(scaler, bad_call)
    skipped = [not outcome.applied for outcome in outcomes]
    assert sum(skipped) == scaler.skipped_steps == 1
    for step, was_skipped in enumerate(skipped):
        before, after = seen[step], seen[step + 1]
        assert all(torch.equal(*pair) for pair in zip(before, after, strict=True)) is was_skipped
        assert outcomes[step].loss_finite is not was_skipped
    assert losses[-1] < 0.01 * losses[0]


def test_a_closure_that_only_its_loss_shows_to_be_bad() -> None:
    """An infinite loss with finite gradients, given to an optimizer that steps on the first call: skipped, and no state made."""
    scaler, parameter = scaler_with(precision_mode="FP32"), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.Adam([parameter], lr=1.0)

    def closure() -> torch.Tensor:
        loss = parameter.sum()
        loss.backward()
        return loss + torch.inf

    scaler.step(optimizer, closure)
    assert (scaler.skipped_steps, scaler.last_outcome.non_finite_losses) == (1, 1)
    assert parameter.tolist() == [1.0]
    assert not optimizer.state
