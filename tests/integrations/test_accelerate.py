"""`hf_amp.attach` on a raw Accelerate loop."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import GradScalerKwargs
from torch import nn

import hf_amp
from hf_amp import AttachError, ConfigError, MixedPrecisionConfig, ScalerError
from tests.each import for_each
from tests.reference import OverflowInBackward, assert_bitwise_equal, snapshot, tiny_mlp

pytestmark = pytest.mark.usefixtures("fresh_accelerator_state")


def run(order: str, fused: bool, overflowing: int | None = 2, **options: Any) -> dict[str, Any]:
    """Six steps of a small network; attach `order` prepare."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    session = hf_amp.attach(accelerator, MixedPrecisionConfig(**options)) if order == "before" else None
    model = tiny_mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 10)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    session = session or hf_amp.attach(accelerator, MixedPrecisionConfig(**options))
    skipped, rates, moved = [], [], []
    for step in range(6):
        before = snapshot(model, optimizer)
        loss = model(torch.linspace(-1, 1, 20).reshape(5, 4)).square().mean()
        accelerator.backward(OverflowInBackward.apply(loss) if step == overflowing else loss)
        accelerator.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        skipped.append(accelerator.optimizer_step_was_skipped)
        rates.append(scheduler.get_last_lr()[0])
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, snapshot(model, optimizer), strict=False)))
    return {
        "accelerator": accelerator,
        "session": session,
        "model": model,
        "optimizer": optimizer,
        "skipped": skipped,
        "rates": rates,
        "moved": moved,
    }  # fmt: skip


@for_each("fused", [False, True])
@for_each("order", ["before", "after"])
def test_loop_with_one_overflow(order: str, fused: bool) -> None:
    """Attached before or after prepare: the overflowing step, and it alone, is skipped and told."""
    result = run(order, fused)
    assert result["skipped"] == [False, False, True, False, False, False]
    assert result["moved"] == [True, True, False, True, True, True]
    assert result["rates"][2] == result["rates"][1] > result["rates"][3]
    assert result["session"].metrics()["skipped_steps"] == 1
    assert result["session"].events[-1].cause == "SCALE"


def test_before_and_after_prepare_train_alike() -> None:
    """The order of attach and prepare does not change a bit of the parameters."""
    results = [run(order, fused=True) for order in ("before", "after")]
    assert_bitwise_equal(*(snapshot(r["model"], r["optimizer"]) for r in results))


def build(owner: Any) -> dict[str, Any]:
    """How `owner` is made: attributes by name; methods, hooks, switches and other objects by identity or value, figures
    that training changes by type."""
    figures = (torch.Tensor, int, float, list)
    return {
        name: type(value)
        if isinstance(value, figures) and not isinstance(value, bool)
        else dict(value)
        if isinstance(value, dict) and all(callable(entry) for entry in value.values())
        else value
        for name, value in vars(owner).items()
        if name != "state" and not name.startswith("_opt_called")
    }


@for_each("precision", ["fp16", "bf16", "no"])
@for_each("emulate", [True, False])
def test_detach_restores_what_was_there(tmp_path: Path, precision: str, emulate: bool) -> None:
    """After training, a skip, a checkpoint and detach, everything is built as before attach: accelerator, optimizers
    (prepared and inner), schedules, every module with its forward and its hooks."""
    accelerator = Accelerator(mixed_precision=precision, cpu=True)
    model = tiny_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    owners = [accelerator, accelerator.state, optimizer, optimizer.optimizer, scheduler, *model.modules()]
    before = [build(owner) for owner in owners]
    for _ in range(2):  # attach, detach, and once more
        with hf_amp.attach(accelerator, MixedPrecisionConfig(emulate=emulate)) as session:
            assert [build(owner) for owner in owners] != before
            for overflowing in (False, True):
                loss = model(torch.ones(5, 4)).square().mean()
                accelerator.backward(OverflowInBackward.apply(loss) if overflowing else loss)
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                scheduler.step()
            accelerator.save_state(str(tmp_path / "saved"))
            accelerator.load_state(str(tmp_path / "saved"))
        assert [build(owner) for owner in owners] == before
        session.detach()
        assert [build(owner) for owner in owners] == before


def globally(owners: list[Any]) -> list[dict[str, int]]:
    """Name → identity of everything that modules and classes hold."""
    return [{name: id(value) for name, value in vars(owner).items() if name[:2] != "__"} for owner in owners]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_nothing_global_is_patched(precision: str) -> None:
    """While a session is attached, trains and skips, classes and modules of torch and accelerate hold what they held."""
    accelerator = Accelerator(mixed_precision=precision, cpu=True)
    model = tiny_mlp()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), fused=True))
    classes = [
        Accelerator,
        type(optimizer),
        torch.amp.GradScaler,
        torch.autocast,
        torch.optim.Optimizer,
        torch.optim.AdamW,
    ]
    modules = [
        torch,
        nn.functional,
        nn.utils,
        torch.autograd,
        sys.modules["accelerate"],
        sys.modules["accelerate.optimizer"],
    ]
    owners = [*classes, nn.Module, nn.Linear, torch.Tensor, *modules]
    before = globally(owners)
    with hf_amp.attach(accelerator):
        for overflowing in (False, True):
            loss = model(torch.ones(5, 4)).square().mean()
            accelerator.backward(OverflowInBackward.apply(loss) if overflowing else loss)
            accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            now = globally(owners)
            assert [{name: found.get(name) for name in held} for held, found in zip(before, now, strict=True)] == before


def test_second_attach_is_a_clear_error() -> None:
    """Two scalers on one loss are refused."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    hf_amp.attach(accelerator)
    with pytest.raises(AttachError, match="detach"):
        hf_amp.attach(accelerator)


@for_each("wrong", [None, "accelerator", nn.Linear(1, 1)])
def test_attach_to_something_else_is_a_clear_error(wrong: object) -> None:
    """The error says what to pass, and what to do with a Trainer."""
    with pytest.raises(AttachError, match=r"pass an accelerate.Accelerator.*MixedPrecisionCallback"):
        hf_amp.attach(wrong)


@for_each("config", [8.0, ["init_scale"], False])
def test_attach_with_something_else_than_options_is_a_clear_error(config: object) -> None:
    """The error shows what was passed, and what can be; the accelerator is as before."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    with pytest.raises(
        ConfigError, match=r"attach\(config=.*pass a MixedPrecisionConfig, a dict of its options, the path"
    ):
        hf_amp.attach(accelerator, config)
    hf_amp.attach(accelerator, MixedPrecisionConfig())


def test_attach_takes_options_in_any_form(tmp_path: Path) -> None:
    """Keywords, a mapping, and the path of a file are the same as a config; a config and keywords together are an error."""
    (tmp_path / "amp.json").write_text('{"init_scale": 8.0}')
    scales = []
    for options in ({"init_scale": 8.0}, {"config": {"init_scale": 8.0}}, {"config": tmp_path / "amp.json"}):
        with hf_amp.attach(Accelerator(mixed_precision="fp16", cpu=True), **options) as session:
            scales.append(session.scaler.get_scale())
    assert scales == [8.0] * 3
    with pytest.raises(ConfigError, match="a config and options as keywords"):
        hf_amp.attach(Accelerator(mixed_precision="fp16", cpu=True), MixedPrecisionConfig(), init_scale=8.0)


def test_two_optimizers_each_move_once() -> None:
    """A GAN's two optimizers with one clip call: both are unscaled once and move as in FP32."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    hf_amp.attach(accelerator, MixedPrecisionConfig(init_scale=1024.0))
    models = [nn.Linear(1, 1, bias=False) for _ in range(2)]
    for model in models:
        nn.init.constant_(model.weight, 1.0)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.25) for model in models]
    models, optimizers = accelerator.prepare(*models), accelerator.prepare(*optimizers)
    accelerator.backward(sum(model(torch.ones(1, 1)).sum() for model in models))
    accelerator.clip_grad_norm_([p for model in models for p in model.parameters()], 100.0)
    for optimizer in optimizers:
        optimizer.step()
    assert [model.weight.item() for model in models] == [0.75, 0.75]


def test_gradients_that_wait_keep_up_with_the_scale_from_the_first_step_on() -> None:
    """The scale doubles between two backward passes while another optimizer's gradients wait: it moves as in FP32."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    session = hf_amp.attach(accelerator, MixedPrecisionConfig(init_scale=1024.0, growth_interval=1))
    first, second = (nn.Linear(1, 1, bias=False) for _ in range(2))
    nn.init.constant_(second.weight, 1.0)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.25) for model in (first, second)]
    first, second, *optimizers = accelerator.prepare(first, second, *optimizers)
    accelerator.backward(second(torch.ones(1, 1)).sum())
    for _ in range(2):
        accelerator.backward(first(torch.ones(1, 1)).sum())
        optimizers[0].step()
        optimizers[0].zero_grad()
    assert session.scaler.get_scale() == 4096.0
    optimizers[1].step()
    assert second.weight.item() == 0.75


@for_each("fused", [False, True])
@for_each(("precision", "detached"), [("fp16", False), ("fp16", True), ("bf16", False)])
def test_stepping_the_optimizer_itself_is_an_error(precision: str, detached: bool, fused: bool) -> None:
    """Its gradients are scaled: nothing moves, and the error says what to step. Without a scale, or detached, it may be."""
    accelerator, model = Accelerator(mixed_precision=precision, cpu=True), tiny_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, fused=fused)
    session = hf_amp.attach(accelerator)
    prepared, prepared_optimizer = accelerator.prepare(model, optimizer)
    for _ in range(2):
        accelerator.backward(prepared(torch.ones(2, 4)).square().mean())
        prepared_optimizer.step()
        prepared_optimizer.zero_grad()
    accelerator.backward(prepared(torch.ones(2, 4)).square().mean())
    before = snapshot(model, optimizer)
    if detached:
        session.detach()
    if detached or precision == "bf16":
        optimizer.step()
        return
    with pytest.raises(ScalerError, match=r"step what accelerator\.prepare\(optimizer\) has returned"):
        optimizer.step()
    assert_bitwise_equal(before, snapshot(model, optimizer))
    prepared_optimizer.step()


@pytest.mark.parametrize("somebody_looks", [False, True])
def test_clipping_folds_unless_a_hook_looks_at_the_gradients(somebody_looks: bool) -> None:
    """Folded, gradients are still scaled after the clip; a hook before the optimizer's step gets them as ever."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    hf_amp.attach(accelerator, MixedPrecisionConfig(init_scale=1024.0, fold_clipping=True))
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    seen: list[float] = []
    if somebody_looks:
        optimizer.register_step_pre_hook(lambda *_: seen.append(model.weight.grad.item()))
    prepared, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(prepared(torch.ones(1, 1)).sum())
    assert accelerator.clip_grad_norm_(model.parameters(), 2.0) == 1.0
    assert model.weight.grad.item() == (1.0 if somebody_looks else 1024.0)
    optimizer.step()
    assert seen == [1.0] * somebody_looks


def test_released_objects_are_not_kept_alive() -> None:
    """After free_memory a session holds neither the model nor the optimizer."""
    import gc
    import weakref

    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    session = hf_amp.attach(accelerator)
    model = tiny_mlp()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    references = [weakref.ref(model), weakref.ref(optimizer)]
    del model, optimizer
    accelerator.free_memory()
    gc.collect()
    assert [reference() for reference in references] == [None, None]
    session.detach()


@pytest.mark.parametrize("cpu", [True, pytest.param(False, marks=pytest.mark.gpu)])
def test_scaler_kwargs_of_the_accelerator_are_followed(cpu: bool) -> None:
    """What GradScalerKwargs set is what our scaler starts with, also on a CPU, for which accelerate makes no scaler."""
    accelerator = Accelerator(
        mixed_precision="fp16", cpu=cpu, kwargs_handlers=[GradScalerKwargs(init_scale=256.0, growth_interval=7)]
    )
    session = hf_amp.attach(accelerator)
    assert session.scaler.get_scale() == 256.0
    assert session.scaler.get_growth_interval() == 7
