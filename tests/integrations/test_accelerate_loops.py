"""What loops do with an Accelerator goes on as before, and tells the truth."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, DistributedType
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import hf_amp
from hf_amp import AttachError, MixedPrecisionConfig, PrecisionMode
from hf_amp.events import Cause, EventKind
from hf_amp.monitoring.metrics import LOG_PREFIX
from hf_amp.report.reader import read_run
from tests.each import for_each
from tests.reference import OverflowInBackward, assert_bitwise_equal, snapshot, tiny_mlp

pytestmark = pytest.mark.usefixtures("fresh_accelerator_state")

BATCH = torch.linspace(-1, 1, 20).reshape(5, 4)


def accumulated(attached: bool) -> tuple[list[bool], list[float]]:
    """Four windows of two micro-batches, the second overflows; what is told after each micro-batch, and the rate."""
    accelerator = Accelerator(mixed_precision="no", cpu=True, gradient_accumulation_steps=2)
    if attached:
        hf_amp.attach(accelerator)
    model = tiny_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    skipped, rates = [], []
    for micro_step in range(8):
        with accelerator.accumulate(model):
            loss = model(BATCH).square().mean()
            accelerator.backward(OverflowInBackward.apply(loss) if micro_step == 2 else loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        skipped.append(accelerator.optimizer_step_was_skipped)
        rates.append(scheduler.get_last_lr()[0])
    return skipped, rates


def test_a_skip_is_told_at_its_own_step_only() -> None:
    """Under accumulation the step after the second window is told skipped, no micro-step after it; its rate stays."""
    skipped, rates = accumulated(attached=True)
    assert skipped == [False, False, False, True, False, False, False, False]
    assert rates == [0.1, 0.05, 0.05, 0.05, 0.05, 0.025, 0.025, 0.0125]


def test_two_optimizers_of_one_backward_search_the_scale_and_stay_in_fp16() -> None:
    """As Muon beside AdamW, from a scale that is far too large: every skip is the scale's, of either optimizer."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    session = hf_amp.attach(accelerator, MixedPrecisionConfig(init_scale=2.0**22))
    model = tiny_mlp()
    optimizers = [torch.optim.AdamW(part.parameters(), lr=1e-3) for part in (model[0], model[2])]
    model, *optimizers = accelerator.prepare(model, *optimizers)
    for _ in range(12):
        accelerator.backward(model(BATCH).square().sum())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    figures = session.metrics()
    assert figures["skipped_steps_scale"] == figures["skipped_steps"] >= 4
    assert figures["applied_steps"] + figures["skipped_steps"] == 24
    assert (session.monitor.losses, figures["precision_changes"]) == (12, 0)


@for_each("created_before_prepare", [True, False])
@for_each("attached_first", [True, False])
def test_schedulers_of_either_optimizer_step_it_once(created_before_prepare: bool, attached_first: bool) -> None:
    """A schedule made for the raw or for the prepared optimizer: one optimizer step a call."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    config = MixedPrecisionConfig(init_scale=1024.0)
    session = hf_amp.attach(accelerator, config) if attached_first else None
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    if created_before_prepare:
        torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    if not created_before_prepare:
        torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    session = session or hf_amp.attach(accelerator, config)
    nn.init.constant_(model.weight, 3.0)
    for _ in range(2):
        accelerator.backward(model(torch.ones(1, 1)).sum())
        optimizer.step()
        optimizer.zero_grad()
    assert model.weight.item() == 1.0
    assert session.scaler.applied_steps == 2


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_a_copied_optimizer_steps_its_own_parameters(copy_of: Any) -> None:
    """A deep copy, or an unpickled one, moves the copy and not the original."""
    accelerator = Accelerator(cpu=True)
    hf_amp.attach(accelerator)
    parameter = nn.Parameter(torch.ones(2))
    optimizer = accelerator.prepare(torch.optim.SGD([parameter], lr=1.0))
    other = copy_of(optimizer)
    (copied,) = other.param_groups[0]["params"]
    copied.grad = torch.ones(2)
    other.step()
    assert copied.tolist() == [0.0, 0.0]
    assert parameter.tolist() == [1.0, 1.0]


@for_each("interrupted_in", [None, 1])
@for_each("set_to_none", [True, False])
def test_a_step_left_out_after_clipping(set_to_none: bool, interrupted_in: int | None) -> None:
    """A norm that is too large, or Ctrl-C in a notebook, between clip and step: zero_grad, and the loop goes on as alone."""
    ends = []
    for attached in (True, False):
        accelerator = Accelerator(mixed_precision="fp16" if attached else "no", cpu=True)
        session = hf_amp.attach(accelerator, init_scale=256.0, emulate=False) if attached else None
        model = nn.Linear(1, 1, bias=False)
        nn.init.ones_(model.weight)
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
        for step in range(4):
            accelerator.backward(model(torch.full((1, 1), 64.0 if step == 1 else 0.5)).sum())
            norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
            if norm <= 8 and step != interrupted_in:
                optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
        ends.append(model.weight.item())
        if session:
            assert (session.scaler.applied_steps, session.metrics()["scale"]) == (3, 256.0)
            session.detach()
        accelerator.state._reset_state(reset_partial_state=True)
    assert ends[0] == ends[1]


def test_a_state_is_loaded_in_the_place_of_a_step(tmp_path: Path) -> None:
    """Rolled back after clipping, where the loss has blown up: the next step is applied."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    session = hf_amp.attach(accelerator, init_scale=256.0)
    model = tiny_mlp()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.save_state(str(tmp_path / "good"))
    for rolls_back in (True, False, False):
        accelerator.backward(model(BATCH).square().mean())
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        if rolls_back:
            accelerator.load_state(str(tmp_path / "good"))
        else:
            optimizer.step()
            optimizer.zero_grad()
    assert session.scaler.applied_steps == 2


def test_a_batch_whose_gradients_the_loop_throws_away_is_not_blamed() -> None:
    """Its loss is NaN: zero_grad, continue. The next step overflows by the scale alone, and says so; the scale falls."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    session = hf_amp.attach(accelerator, init_scale=256.0)
    model = tiny_mlp()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-3))
    for step in range(4):
        loss = model(BATCH * torch.nan if step == 1 else BATCH).square().mean()
        accelerator.backward(loss * 1e7 if step == 2 else loss)
        if loss.isfinite():
            optimizer.step()
        optimizer.zero_grad()
    (skip,) = [event for event in session.events if event.kind is EventKind.STEP_SKIPPED]
    assert (skip.cause, skip.figures["losses"], skip.figures["non_finite_losses"]) == (Cause.SCALE, 1, 0)
    assert session.metrics()["scale"] == 128.0
    assert session.monitor.non_finite_losses == 0


@for_each("unscales", [True, False])
def test_the_scaler_by_hand_divides_a_prepared_optimizer_once(unscales: bool) -> None:
    """`accelerator.scaler.step(prepared)` and `unscale_(prepared)` followed by `prepared.step()`: as FP32 alone, to the bit."""
    ends = []
    for attached in (True, False):
        accelerator = Accelerator(mixed_precision="fp16" if attached else "no", cpu=True)
        session = hf_amp.attach(accelerator, init_scale=256.0, emulate=False) if attached else None
        model = nn.Linear(1, 1, bias=False)
        nn.init.ones_(model.weight)
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
        for _ in range(3):
            loss = model(torch.full((1, 1), 0.5)).sum()
            if session is None:
                accelerator.backward(loss)
                optimizer.step()
            else:
                session.scaler.scale(loss).backward()
                if unscales:
                    session.scaler.unscale_(optimizer)
                    assert model.weight.grad.item() == 0.5
                    optimizer.step()
                else:
                    session.scaler.step(optimizer)
                    session.scaler.update()
            optimizer.zero_grad()
        ends.append(model.weight.item())
        if session:
            assert (session.scaler.applied_steps, session.scaler.skipped_steps) == (3, 0)
            session.detach()
        accelerator.state._reset_state(reset_partial_state=True)
    assert ends[0] == ends[1]


@for_each("precision", ["no", "bf16"])
def test_lbfgs_through_an_accelerator(precision: str) -> None:
    """As without hf_amp to the bit; a closure that gives NaN within the second step skips it, and the Accelerator says so."""
    ends, told = {}, []
    for attached, bad_call in ((False, None), (True, None), (True, 7)):
        accelerator = Accelerator(mixed_precision=precision, cpu=True)
        session = hf_amp.attach(accelerator) if attached else None
        model = tiny_mlp()
        model, optimizer = accelerator.prepare(model, torch.optim.LBFGS(model.parameters(), max_iter=4))
        calls = 0

        def closure(accelerator=accelerator, model=model, optimizer=optimizer, bad_call=bad_call) -> torch.Tensor:
            nonlocal calls
            calls += 1
            optimizer.zero_grad()
            loss = model(BATCH).float().sub(1).square().mean() * (torch.nan if calls == bad_call else 1.0)
            accelerator.backward(loss)
            return loss

        for _ in range(3):
            optimizer.step(closure)
            told.append(accelerator.optimizer_step_was_skipped)
        ends[attached, bad_call] = [p.detach().clone() for p in model.parameters()]
        if session:
            assert session.metrics()["skipped_steps"] == (bad_call is not None)
            session.detach()
        accelerator.state._reset_state(reset_partial_state=True)
    assert_bitwise_equal(ends[True, None], ends[False, None])
    assert told == [False] * 6 + [False, True, False]
    assert all(p.isfinite().all() for p in ends[True, 7])


def test_clipping_by_value_sees_unscaled_gradients() -> None:
    """After clip_grad_value_ no gradient is beyond the limit, and those within it are FP32's to rounding."""
    gradients = []
    for precision in ("no", "fp16"):
        accelerator = Accelerator(mixed_precision=precision, cpu=True)
        session = hf_amp.attach(accelerator)
        model, optimizer = accelerator.prepare(tiny_mlp(), torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
        optimizer.add_param_group({"params": list(model.parameters())})
        accelerator.backward(model(BATCH).square().mean())
        accelerator.clip_grad_value_(model.parameters(), 0.02)
        gradients.append([p.grad.clone() for p in model.parameters()])
        session.detach()
        accelerator.state._reset_state(reset_partial_state=True)
    assert max(g.abs().max() for g in gradients[1]) == torch.tensor(0.02)
    for expected, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-4)


def test_two_networks_with_an_optimizer_each_take_their_turns() -> None:
    """A GAN's loop in which the discriminator overflows once: its optimizer and schedule stand, the generator's move."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    session = hf_amp.attach(accelerator, MixedPrecisionConfig(init_scale=1024.0))
    networks = [nn.Linear(2, 2), nn.Linear(2, 1)]
    optimizers = [torch.optim.AdamW(network.parameters(), lr=0.1) for network in networks]
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5) for optimizer in optimizers]
    # Each schedule with its own optimizer; accelerate ties a scheduler to all that are prepared together with it.
    prepared = [accelerator.prepare(*trio) for trio in zip(networks, optimizers, schedulers, strict=True)]
    (generator, g_optimizer, g_schedule), (discriminator, d_optimizer, d_schedule) = prepared
    moved = []
    for step in range(3):
        before = snapshot(generator, g_optimizer), snapshot(discriminator, d_optimizer)
        d_optimizer.zero_grad()
        loss = discriminator(generator(torch.ones(3, 2)).detach()).square().mean()
        accelerator.backward(OverflowInBackward.apply(loss) if step == 1 else loss)
        accelerator.clip_grad_norm_(discriminator.parameters(), 1.0)
        d_optimizer.step()
        g_optimizer.zero_grad()
        accelerator.backward(discriminator(generator(torch.ones(3, 2))).sigmoid().mean())
        accelerator.clip_grad_norm_(generator.parameters(), 1.0)
        g_optimizer.step()
        d_schedule.step()
        g_schedule.step()
        after = snapshot(generator, g_optimizer), snapshot(discriminator, d_optimizer)
        moved.append(
            [
                any(not torch.equal(a, b) for a, b in zip(*pair, strict=False))
                for pair in zip(before, after, strict=True)
            ]
        )
    assert moved == [[True, True], [True, False], [True, True]]
    assert g_schedule.get_last_lr() == [0.0125]
    assert d_schedule.get_last_lr() == [0.025]
    assert session.metrics()["skipped_steps"] == 1


@pytest.mark.parametrize("emulate", [True, False])
def test_accelerator_autocast_is_fp16_on_a_cpu(emulate: bool) -> None:
    """A matrix product of the loop's own inside `accelerator.autocast()` overflows as FP16's does, outside it does not."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    session = hf_amp.attach(accelerator, MixedPrecisionConfig(emulate=emulate))
    large = torch.full((2, 2), 250.0)
    with accelerator.autocast():
        assert (large @ large).isinf().all()
    with accelerator.autocast(AutocastKwargs(cache_enabled=False)):
        assert (large @ large).isinf().all()
        assert (large @ large).dtype == torch.float16
    with accelerator.autocast(AutocastKwargs(enabled=False)):
        assert (large @ large).isfinite().all()
    assert (large @ large).isfinite().all()
    session.detach()
    with accelerator.autocast():
        assert (large @ large).isfinite().all()


def test_autocast_with_options_follows_the_plan() -> None:
    """Once the whole model has left FP16, so has what the loop runs inside of `autocast(AutocastKwargs(...))`."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    session = hf_amp.attach(accelerator)
    model = nn.Linear(1, 1)  # all of the model is one module
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-12))
    accelerator.backward(prepared(torch.full((1, 1), 1e6)).sum())
    optimizer.step()
    assert session.plan.default is PrecisionMode.FP32
    large = torch.full((2, 2), 250.0)
    with accelerator.autocast(AutocastKwargs(cache_enabled=False)):
        assert (large @ large).isfinite().all()


def test_later_prepared_objects_are_under_the_same_scaler() -> None:
    """A second model and optimizer prepared after training has begun: scaled, skipped and counted like the first."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    session = hf_amp.attach(accelerator)
    for count in (1, 2):
        model = tiny_mlp()
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        before = snapshot(model, optimizer)
        accelerator.backward(OverflowInBackward.apply(model(BATCH).square().mean()))
        optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(before, snapshot(model, optimizer), strict=True))
        assert session.metrics()["skipped_steps"] == count
        assert accelerator.unwrap_model(model) is model


def test_attach_again_after_free_memory_begins_anew() -> None:
    """Once what was trained is released the same Accelerator takes a new session; the old one is detached."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    first = hf_amp.attach(accelerator)
    model, optimizer = accelerator.prepare(tiny_mlp(), torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
    accelerator.backward(model(BATCH).mean())
    optimizer.step()
    with pytest.raises(AttachError, match="detach"):
        hf_amp.attach(accelerator)
    model, optimizer = accelerator.free_memory(model, optimizer)
    second = hf_amp.attach(accelerator)
    assert first.events[-1].kind is hf_amp.EventKind.DETACHED
    assert accelerator.scaler is second.scaler
    second.detach()
    assert "save_state" not in vars(accelerator)


def test_megatron_is_refused() -> None:
    """It scales by itself: a clear error instead of two scalers on one loss, and nothing is changed."""
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = DistributedType.MEGATRON_LM
    before = dict(vars(accelerator))
    with pytest.raises(AttachError, match="two scalers on one loss"):
        hf_amp.attach(accelerator)
    assert vars(accelerator) == before


def test_metrics_reach_the_trackers(tmp_path: Path) -> None:
    """`accelerator.log` writes ours beside the loop's own, once a step; without a step in between it adds nothing."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True, log_with="tensorboard", project_dir=tmp_path)
    hf_amp.attach(accelerator, MixedPrecisionConfig(init_scale=128.0))
    accelerator.init_trackers("run", config={"lr": 0.1})
    model = tiny_mlp()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.log({"loss/before": 1.0}, step=0)
    for step in (1, 2):
        accelerator.backward(model(BATCH).square().mean())
        optimizer.step()
        accelerator.log({"loss/train": 0.5}, step=step)
        accelerator.log({"loss/eval": 0.25}, step=10 + step)
    accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    tags = events.Tags()["scalars"]
    assert {"loss/before", "loss/train", "loss/eval"} < set(tags)
    assert [(e.step, e.value) for e in events.Scalars(LOG_PREFIX + "scale")] == [(1, 128.0), (2, 128.0)]
    assert [(e.step, e.value) for e in events.Scalars(LOG_PREFIX + "applied_steps")] == [(1, 1.0), (2, 2.0)]


def test_trackers_and_the_sessions_log_name_a_skip(tmp_path: Path) -> None:
    """The words are in TensorBoard at the step, with our metrics; the JSON log has the same figures, also of a loss that is a tensor."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True, log_with="tensorboard", project_dir=tmp_path)
    session = hf_amp.attach(accelerator, MixedPrecisionConfig(monitor_modules=True, monitoring_interval=1))
    session.log_to(tmp_path)
    accelerator.init_trackers("run")
    model = tiny_mlp()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for step in (1, 2, 3):
        accelerator.backward(model(BATCH * (torch.nan if step == 2 else 1.0)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        accelerator.log({"loss": torch.tensor(0.5) if step == 3 else 0.5, "learning_rate": {}}, step=step)
    accelerator.end_training()
    board = EventAccumulator(str(tmp_path / "run")).Reload()
    (words,) = board.Tensors("amp_incident/text_summary")
    assert words.step == 2
    assert b"step 2: step_skipped (INPUT)" in words.tensor_proto.string_val[0]
    run = read_run(tmp_path)
    assert list(run.figures["loss"]) == [(1, 0.5), (2, 0.5), (3, 0.5)]
    assert list(run.figures["applied_steps"].values) == [1.0, 1.0, 2.0]


@pytest.mark.parametrize("leave", ["step", "detach"])
def test_ctrl_c_in_a_forward_pass_leaves_nothing_behind(leave: str) -> None:
    """As in a notebook: the next step, or `detach`, ends the precision that the interrupted forward pass was in."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    session = hf_amp.attach(accelerator)
    model = tiny_mlp()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    last = list(model.modules())[-1]

    def interrupt(*_: Any) -> None:
        handle.remove()
        raise KeyboardInterrupt

    handle = last.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(BATCH)
    large = torch.full((2, 1), 300.0)
    assert (large @ large.T).isinf().all()
    if leave == "step":
        accelerator.backward(model(BATCH).square().mean())
        optimizer.step()
    else:
        session.detach()
    assert (large @ large.T).isfinite().all()
