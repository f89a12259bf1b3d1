"""How people use `torch.amp.GradScaler`: in all of these places ours does, to the bit, what the stock class does there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import _refresh_per_optimizer_state

from hf_amp import AdvancedGradScaler, MixedPrecisionConfig
from tests.each import for_each
from tests.reference import OverflowInBackward, assert_bitwise_equal, tiny_mlp

STEPS, OVERFLOWS = 14, {2, 3, 8}
OPTIONS = {"init_scale": 64.0, "growth_interval": 3}

Scaler = torch.amp.GradScaler


def batch(step: int, number: int = 0) -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(7 * step + number))


class Run:
    """A model, its optimizer, and what a loop has seen of the scaler."""

    def __init__(self, seed: int) -> None:
        self.model, self.seen = tiny_mlp(seed), [0.0]
        self.optimizer: Any = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)

    def loss(self, step: int, number: int = 0) -> Tensor:
        loss = self.model(batch(step, number)).square().mean()
        return OverflowInBackward.apply(loss) if number == 0 and step in OVERFLOWS else loss

    def step(self, scaler: Scaler, new_scale: float | None = None) -> None:
        scaler.step(self.optimizer)
        scaler.update(new_scale)
        self.optimizer.zero_grad()
        self.seen.append(scaler.get_scale())

    def steps(self, scaler: Scaler, after: bool = False) -> Iterator[int]:
        """Whole steps; the caller's part comes between backward and step, or after the update."""
        for step in range(STEPS):
            scaler.scale(self.loss(step)).backward()
            yield from () if after else (step,)
            self.step(scaler)
            yield from (step,) if after else ()


def timm(scaler: Scaler, run: Run, *_: Run) -> None:
    """timm's NativeScaler: `create_graph` for second-order optimizers, and a step only where `need_update`."""
    for step in range(STEPS):
        scaler.scale(run.loss(step) / 2).backward(create_graph=True)
        if step % 2:
            scaler.unscale_(run.optimizer)
            nn.utils.clip_grad_norm_(run.model.parameters(), 0.05)
            run.step(scaler)


def numbers(scaler: Scaler, run: Run, *_: Run) -> None:
    """`update(number)`: mmengine's AmpOptimWrapper in every step, icefall (k2) right after an update, for a small scale."""
    for step in range(STEPS):
        scaler.scale(run.loss(step)).backward()
        run.step(scaler, 16.0 if step < 4 else None)
        if scaler._scale.item() < 32.0:
            scaler.update(scaler._scale.item() * 2.0)


def assigned(scaler: Scaler, run: Run, *_: Run) -> None:
    """Scripts with `amp_min_scale`, and guards against divergence: the stock class's attributes are assigned."""
    scaler._init_scale = 128.0
    run.seen.append(scaler.get_scale())
    for step in run.steps(scaler, after=True):
        scale, _growth_tracker = scaler._check_scale_growth_tracker("update")
        if scale < 64.0:
            scaler._scale = torch.tensor(64.0).to(scale)
            scaler._growth_tracker = torch.ones((), dtype=torch.int32)
        if step == 9:
            scaler.set_growth_factor(4.0)
            scaler._growth_interval, scaler._backoff_factor = 2, 0.25


def scaled_by_hand(scaler: Scaler, run: Run, *_: Run) -> None:
    """Pipelines and gradient hooks: the scale is put on a device first, and `_get_scale_async()` multiplies the loss."""
    scaler._lazy_init_scale_growth_tracker(torch.device("cpu"))
    for step in range(STEPS):
        _ = scaler.scale(torch.zeros(())) if step == 5 else None
        (run.loss(step) * scaler._get_scale_async()).backward()
        run.step(scaler)


def nanochat(scaler: Scaler, run: Run, *_: Run) -> None:
    """nanochat: ranks reduce their verdicts into `_found_inf_per_device` in place; here another rank overflows at 5."""
    for step in run.steps(scaler):
        scaler.unscale_(run.optimizer)
        for found in scaler._found_inf_per_device(run.optimizer).values():
            torch.maximum(found, torch.tensor(float(step == 5)), out=found)


def checked_again(scaler: Scaler, run: Run, *_: Run) -> None:
    """Diffusion trainers on Accelerate: `_check_inf_per_device` after the clip, for what went wrong since."""
    for step in run.steps(scaler):
        scaler.unscale_(run.optimizer)
        weight = run.model[0].weight
        weight.grad = weight.grad * (torch.nan if step == 5 else 0.5)
        scaler._check_inf_per_device(run.optimizer)


def sam(scaler: Scaler, run: Run, *_: Run) -> None:
    """SAM loops: climb where `_per_optimizer_states` has no inf, update, and step from the second backward."""
    weights = list(run.model.parameters())
    for step in range(STEPS):
        scaler.scale(run.loss(step)).backward()
        scaler.unscale_(run.optimizer)
        state = scaler._per_optimizer_states[id(run.optimizer)]
        before = [p.detach().clone() for p in weights]
        if not sum(found.item() for found in state["found_inf_per_device"].values()):
            torch._foreach_add_([p.data for p in weights], [p.grad for p in weights], alpha=0.05)
        scaler.update()
        run.optimizer.zero_grad()
        scaler.scale(run.loss(step, 1)).backward()
        torch._foreach_copy_([p.data for p in weights], before)
        run.step(scaler)


def started_anew(scaler: Scaler, run: Run, *_: Run) -> None:
    """Composer after an OOM, and loops that keep gradients aside: `_per_optimizer_states` is emptied within a step."""
    for step in run.steps(scaler):
        scaler.unscale_(run.optimizer)
        run.optimizer.zero_grad(set_to_none=False)
        if step % 2:
            scaler._per_optimizer_states = defaultdict(_refresh_per_optimizer_state)
        else:
            scaler._per_optimizer_states.pop(id(run.optimizer), None)
        scaler.scale(run.loss(step, 1)).backward()
        scaler.unscale_(run.optimizer)


def left_out(scaler: Scaler, run: Run, *_: Run) -> None:
    """Loops that leave a step out where the norm is too large, and call `update()` all the same."""
    for step in range(STEPS):
        scaler.scale(run.loss(step)).backward()
        scaler.unscale_(run.optimizer)
        norm = nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        _ = scaler.step(run.optimizer) if norm < 0.4 else None
        scaler.update()
        run.optimizer.zero_grad(set_to_none=step % 3 == 0)
        run.seen += [scaler.get_scale(), norm.nan_to_num(-1.0).item()]


def gan(scaler: Scaler, critic: Run, generator: Run, *_: Run) -> None:
    """GANs under one scaler: a gradient penalty by hand, the generator's loss through the critic, one update."""
    for step in range(STEPS):
        fake, x = nn.functional.pad(generator.model(batch(step)), (0, 1)), batch(step, 2).requires_grad_()
        critic.optimizer.zero_grad()
        (slope,) = torch.autograd.grad(scaler.scale(critic.model(x).sum()), x, create_graph=True)
        penalty = ((slope / scaler.get_scale()).norm(dim=1) - 1).square().mean()
        loss = critic.loss(step) - critic.model(fake.detach()).mean() + penalty
        scaler.scale(loss).backward(retain_graph=True)
        scaler.step(critic.optimizer)
        generator.optimizer.zero_grad()
        scaler.scale(-critic.model(fake).mean()).backward()
        generator.step(scaler)


def projected(scaler: Scaler, *runs: Run) -> None:
    """Multi-task and RL loops: each optimizer is unscaled, its gradients are replaced, and all step at the end."""
    for step in range(STEPS):
        for number, run in enumerate(runs):
            run.optimizer.zero_grad()
            scaler.scale(run.loss(step, number)).backward()
            scaler.unscale_(run.optimizer)
            for p in run.model.parameters():
                p.grad = p.grad.sign() * 0.01 + p.grad
        for run in runs:
            scaler.step(run.optimizer)
        scaler.update()


class TakesScaler(torch.optim.SGD):
    """Unscales by itself, with the scaler that it is given."""

    _step_supports_amp_scaling = True

    def step(self, closure: Any = None, grad_scaler: Any = None) -> Any:
        if grad_scaler is not None:
            grad_scaler.unscale_(self)
            if any(found.item() for found in grad_scaler._found_inf_per_device(self).values()):
                return None
        return super().step(closure)


def takes_the_scaler(scaler: Scaler, run: Run, *_: Run) -> None:
    """NVIDIA Apex: optimizers whose `step` has an argument `grad_scaler`."""
    run.optimizer = TakesScaler(run.model.parameters(), lr=0.05)
    list(run.steps(scaler))


class Wrapper:
    """Neither hashable nor weakly referable, and hands on what it does not have."""

    __hash__, __slots__ = None, ("inner",)

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def wrapped(scaler: Scaler, run: Run, *_: Run) -> None:
    """Lookahead and the like: what is stepped is no `Optimizer`, but holds one."""
    run.optimizer = Wrapper(run.optimizer)
    for step in run.steps(scaler):
        if step % 3 == 0:
            scaler.unscale_(run.optimizer)


PATTERNS = [
    timm, numbers, assigned, scaled_by_hand, nanochat, checked_again, sam, started_anew, left_out, gan, projected,
    takes_the_scaler, wrapped,
]  # fmt: skip


def outcome(pattern: Callable[..., None], scaler: Scaler) -> list[Tensor]:
    runs = [Run(seed) for seed in range(3)]
    pattern(scaler, *runs)
    return [tensor for run in runs for tensor in (*run.model.parameters(), torch.tensor(run.seen))]


@for_each("pattern", PATTERNS)
@pytest.mark.filterwarnings("ignore:GradScaler is going to stop passing itself", "ignore:Using backward")
def test_is_the_stock_scalers_run_to_the_bit(pattern: Callable[..., None]) -> None:
    """With overflows in between: the same parameters, scales and whatever else the loop has looked at."""
    stock, ours = Scaler("cpu", **OPTIONS), AdvancedGradScaler(MixedPrecisionConfig(**OPTIONS), "cpu")
    assert_bitwise_equal(outcome(pattern, stock), outcome(pattern, ours))


@for_each("pattern", PATTERNS)
@for_each(
    "options",
    [{"scaling_strategy": s} for s in ("ADAPTIVE", "CONSTANT", "PERFORMANCE_OPTIMIZED")]
    + [{"precision_mode": "BF16"}, {"half_parameters": "master_weights"}],
)
@pytest.mark.filterwarnings("ignore:Using backward")
def test_no_strategy_lets_an_overflow_through(pattern: Callable[..., None], options: dict[str, str]) -> None:
    """Under every other strategy, and in a guard, the same loops run and their parameters stay finite."""
    scaler = AdvancedGradScaler(MixedPrecisionConfig(**OPTIONS, **options), "cpu")
    assert all(tensor.isfinite().all() for tensor in outcome(pattern, scaler))


@pytest.mark.parametrize("make", [Scaler, AdvancedGradScaler])
def test_a_step_is_looked_up_as_open_from_unscale_to_update(make: Callable[..., Scaler]) -> None:
    """`id(optimizer) in scaler._per_optimizer_states`, of the stock class and of ours."""
    scaler, run = make(device="cpu"), Run(0)
    seen = []
    for act in (lambda: None, lambda: scaler.unscale_(run.optimizer), lambda: run.step(scaler)):
        if not seen:
            scaler.scale(run.loss(0)).backward()
        act()
        seen.append(id(run.optimizer) in scaler._per_optimizer_states)
    assert seen == [False, True, False]
