"""What becomes of half-precision parameters before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from transformers import Trainer, set_seed

import hf_amp
from hf_amp import AttachError, EventKind, MixedPrecisionCallback, MixedPrecisionConfig, PrecisionMode
from hf_amp.scaling.master_weights import MasterWeights, convert_parameters
from tests.each import for_each
from tests.integrations.half_models import dtypes, loaded
from tests.integrations.trainers import arguments, text_rows
from tests.reference import tiny_mlp

HALF = [torch.float16, torch.bfloat16]


pytestmark = pytest.mark.usefixtures("fresh_accelerator_state")


def trainer_on(model: nn.Module, folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    set_seed(0)
    return Trainer(model, arguments(folder, **options), train_dataset=text_rows(), callbacks=list(callbacks))


def notices(session: hf_amp.AmpSession) -> list[hf_amp.AmpEvent]:
    """The events of the preflight."""
    kinds = (EventKind.HALF_PARAMETERS, EventKind.PARAMETERS_CONVERTED, EventKind.MASTER_WEIGHTS_KEPT)
    return [event for event in session.events if event.kind in kinds]


# ---- Trainer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF)
def test_fp16_trainer_upcasts_what_from_pretrained_loaded(tmp_path: Path, dtype: torch.dtype) -> None:
    """fp16=True on an FP16 or BF16 model: FP32 before step 1, one event that names parameters, and the loss falls."""
    model = loaded(tmp_path / "model", dtype)
    callback = MixedPrecisionCallback()
    trainer = trainer_on(model, tmp_path, callback, max_steps=8, learning_rate=1e-2)
    trainer.train()
    (event,) = notices(callback.session)
    assert (event.step, event.kind, event.after) == (0, EventKind.PARAMETERS_CONVERTED, "FP32")
    assert event.before == {torch.float16: "FP16", torch.bfloat16: "BF16"}[dtype]
    assert "transformer.wte.weight" in event.message
    assert "and 13 more" in event.message
    assert event.figures == {"parameters": 16, "elements": sum(p.numel() for p in model.parameters())}
    assert dtypes(model) == {torch.float32}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert callback.session.metrics()["applied_steps"] == 8


def test_upcasting_late_changes_nothing(tmp_path: Path) -> None:
    """add_callback, and a second train() with optimizer state, train the parameters that `callbacks=[...]` trains."""
    ends = []
    for late in (False, True):
        model = loaded(tmp_path / "model", torch.bfloat16)
        callback = MixedPrecisionCallback()
        trainer = trainer_on(model, tmp_path, *([] if late else [callback]))
        if late:
            trainer.add_callback(callback)
        trainer.train()
        trainer.train()
        assert len(notices(callback.session)) == 1
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("dtype", HALF)
def test_error_names_parameters_and_remedies(tmp_path: Path, dtype: torch.dtype) -> None:
    """half_parameters="error" stops before step 1: which parameters, how many, what is allowed, what to do."""
    callback = MixedPrecisionCallback({"half_parameters": "error"})
    trainer = trainer_on(loaded(tmp_path / "model", dtype), tmp_path, callback)
    with pytest.raises(AttachError) as raised:
        trainer.train()
    message = str(raised.value)
    name = {torch.float16: "FP16", torch.bfloat16: "BF16"}[dtype]
    assert f"16 {name} parameters (transformer.wte.weight, transformer.wpe.weight" in message
    for words in ('half_parameters="error"', "MIXED", "dtype=torch.float32", "freeze", '"master_weights"'):
        assert words in message
    assert trainer.state.global_step == 0


@for_each("mode", ["fp16", "bf16", "no"])
@for_each("choice", ["error", "upcast", "master_weights", None])
def test_frozen_half_parameters_are_fine(tmp_path: Path, mode: str, choice: str | None) -> None:
    """A frozen half-precision body under an FP32 head, as in LoRA, is left as it is, whatever is configured."""
    model = loaded(tmp_path / "model", torch.float16 if mode == "fp16" else torch.bfloat16)
    model.requires_grad_(False)
    model.transformer.ln_f.float().requires_grad_(True)
    before = [p.dtype for p in model.parameters()]
    accelerator = Accelerator(mixed_precision=mode, cpu=True)
    session = hf_amp.attach(accelerator, MixedPrecisionConfig(half_parameters=choice))
    accelerator.prepare(model)
    assert notices(session) == []
    assert [p.dtype for p in model.parameters()] == before


def test_lora_like_fp16_run_trains(tmp_path: Path) -> None:
    """fp16=True with a frozen FP16 body and an FP32 norm that trains: every step is applied, the body does not move."""
    model = loaded(tmp_path / "model", torch.float16)
    model.requires_grad_(False)
    model.transformer.ln_f.float().requires_grad_(True)
    body, head = model.transformer.wte.weight.clone(), model.transformer.ln_f.weight.clone()
    callback = MixedPrecisionCallback()
    trainer_on(model, tmp_path, callback).train()
    assert callback.session.metrics()["applied_steps"] == 6
    assert torch.equal(body, model.transformer.wte.weight)
    assert not torch.equal(head, model.transformer.ln_f.weight)


# ---- BF16 runs: training works, and loses updates ---------------------------------------------------------------


def test_stock_bf16_trainer_loses_updates_in_silence(tmp_path: Path) -> None:
    """FIELD.md 8: at lr 1e-5 a stock bf16=True run leaves most weights of a BF16 model as they were, without a word."""
    model = loaded(tmp_path / "model", torch.bfloat16)
    before = [p.detach().clone() for p in model.parameters()]
    trainer_on(model, tmp_path, fp16=False, bf16=True, learning_rate=1e-5, max_steps=1).train()
    assert unchanged(model, before) > 0.8


def unchanged(model: nn.Module, before: list[torch.Tensor]) -> float:
    """The exact share of elements that are what they were."""
    same = sum((p == old).sum().item() for p, old in zip(model.parameters(), before, strict=True))
    return same / sum(p.numel() for p in model.parameters())


def test_bf16_run_warns_and_measures_what_is_lost(tmp_path: Path) -> None:
    """With hf_amp the same run has a warning, trains the same bits, and `lost_update_fraction` is the exact count's."""
    ends, callback = [], MixedPrecisionCallback({"monitoring_interval": 1})
    options = {"fp16": False, "bf16": True, "learning_rate": 1e-5}
    for callbacks in ([], [callback]):
        model = loaded(tmp_path / "model", torch.bfloat16)
        before = [p.detach().clone() for p in model.parameters()]
        trainer_on(model, tmp_path, *callbacks, max_steps=1, **options).train()
        ends.append([p.detach().clone() for p in model.parameters()])
        exact = unchanged(model, before)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert notices(callback.session) == []  # not before it is measured
    two = MixedPrecisionCallback({"monitoring_interval": 100})
    trainer = trainer_on(loaded(tmp_path / "model", torch.bfloat16), tmp_path, two, max_steps=2, **options)
    trainer.train()
    reported = [entry.get("amp/lost_update_fraction") for entry in trainer.state.log_history[:2]]
    assert reported[0] is None  # the first step's share is known with the second
    assert reported[1] > 0.9 * exact  # of the updates that were due: rows of the embedding that do not occur have none
    (event,) = notices(two.session)
    assert (event.kind, event.step) == (EventKind.HALF_PARAMETERS, 2)
    assert event.kind.needs_attention
    assert event.figures["lost_update_fraction"] == reported[1]
    assert "of the updates of 16 BF16 parameters" in event.message
    elements = sum(p.numel() for p in trainer.model.parameters())
    for remedy, added in (("stochastic_rounding", "nothing"), ("kahan", f"{2 * elements / 1000:.3g} kB")):
        assert f'"{remedy}" adds {added}' in event.message
    for remedy, added in (("upcast", 8), ("master_weights", 10)):  # two averages of AdamW
        assert f'"{remedy}" adds {added * elements / 1000:.3g} kB' in event.message


@pytest.mark.parametrize("choice", ["upcast", "master_weights"])
def test_remedies_lose_no_update(tmp_path: Path, choice: str) -> None:
    """Either remedy in a BF16 run: after 30 steps at lr 1e-5 nearly every weight's FP32 value has moved; no metric is told."""
    model = loaded(tmp_path / "model", torch.bfloat16)
    before = [p.detach().float().clone() for p in model.parameters()]
    callback = MixedPrecisionCallback({"half_parameters": choice, "monitoring_interval": 1})
    trainer = trainer_on(model, tmp_path, callback, fp16=False, bf16=True, learning_rate=1e-5)
    trainer.train()
    if choice == "upcast":
        wide = [p.detach() for p in model.parameters()]
    else:
        assert dtypes(model) == {torch.bfloat16}
        by_parameter = dict(
            zip(
                (p for g in trainer.optimizer.param_groups for p in g["params"]),
                trainer.optimizer.state_dict()["hf_amp_master_weights"].values(),
                strict=True,
            )
        )
        wide = [by_parameter[p] for p in model.parameters()]
    moved = sum((a != b).sum().item() for a, b in zip(wide, before, strict=True))
    unseen = 16 * 256  # at most all rows of the embedding, which the loss reaches only through the bytes in the batch
    assert moved >= sum(p.numel() for p in before) - unseen
    assert "lost_update_fraction" not in callback.session.metrics()


@pytest.mark.parametrize("choice", ["stochastic_rounding", "kahan"])
def test_a_trainer_resumes_bitwise(tmp_path: Path, choice: str) -> None:
    """Six steps of a BF16 run equal three, a checkpoint, and three more, with everything that rounding depends on."""
    options = {"fp16": False, "bf16": True, "learning_rate": 1e-4, "save_steps": 3, "save_strategy": "steps"}
    ends = []
    for name in ("straight", "resumed"):
        model = loaded(tmp_path / "model", torch.bfloat16)
        trainer = trainer_on(model, tmp_path / "run", MixedPrecisionCallback(half_parameters=choice), **options)
        trainer.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-3") if name == "resumed" else None)
        assert dtypes(model) == {torch.bfloat16}
        ends.append([p.detach().clone() for p in trainer.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


# ---- Accelerate -------------------------------------------------------------------------------------------------


def step(accelerator: Accelerator, model: nn.Module, optimizer: Any) -> None:
    accelerator.backward(model(torch.ones(2, 4)).float().square().mean())
    optimizer.step()
    optimizer.zero_grad()


@for_each("order", ["attach first", "attach last", "optimizer first"])
def test_optimizer_made_before_goes_on(order: str) -> None:
    """Upcasting keeps the parameters that an optimizer holds, and widens the state that it has made for them."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    model = tiny_mlp().to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 4, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    held = list(model.parameters())
    assert optimizer.state[held[0]]["exp_avg"].dtype == torch.bfloat16
    moment = optimizer.state[held[0]]["exp_avg"].float()
    if order != "attach last":
        hf_amp.attach(accelerator)
    if order == "optimizer first":
        prepared = accelerator.prepare(optimizer, device_placement=[False])
        model = accelerator.prepare(model)
    else:
        model, prepared = accelerator.prepare(model, optimizer, device_placement=[False, False])
    if order == "attach last":
        hf_amp.attach(accelerator)
    assert torch.equal(optimizer.state[held[0]]["exp_avg"], moment)
    assert {p.dtype for p in held} == {torch.float32}
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], held, strict=True))
    assert all(p.grad is None for p in held)
    before = [p.detach().clone() for p in held]
    step(accelerator, model, prepared)
    assert not any(torch.equal(a, b) for a, b in zip(before, held, strict=True))


def test_clipping_in_a_bf16_run_with_master_weights_is_fp32s() -> None:
    """The norm and the clipped gradients that masters move by are FP32, not rounded to BF16, where nothing is scaled."""
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    hf_amp.attach(accelerator, MixedPrecisionConfig(half_parameters="master_weights"))
    model = tiny_mlp().to(torch.bfloat16)
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.backward(model(torch.ones(2, 4)).float().square().mean())
    wide = [p.grad.double() for p in model.parameters()]
    norm = accelerator.clip_grad_norm_(model.parameters(), 0.01)
    exact = torch.cat([g.flatten() for g in wide]).norm()
    assert norm.item() == pytest.approx(exact.item(), rel=1e-6)
    for p, g in zip(model.parameters(), wide, strict=True):
        torch.testing.assert_close(p.grad.double(), g * 0.01 / (exact + 1e-6), rtol=1e-6, atol=0)


def test_dynamic_precision_upcasts_in_bf16_runs_too() -> None:
    """DYNAMIC tries FP32 as well, for which BF16 parameters become FP32; a plain BF16 run leaves them."""
    for mode, expected in (("DYNAMIC", torch.float32), (None, torch.bfloat16)):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(mixed_precision="bf16", cpu=True)
        hf_amp.attach(accelerator, MixedPrecisionConfig(precision_mode=mode))
        model = accelerator.prepare(tiny_mlp().to(torch.bfloat16))
        assert dtypes(model) == {expected}


def test_refused_attach_leaves_the_accelerator_alone() -> None:
    """Where attach finds what it must refuse, the accelerator is as before, and can be attached to again."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    model = tiny_mlp().half()
    accelerator.prepare(model)
    before = dict(vars(accelerator))
    with pytest.raises(AttachError, match="4 FP16 parameters"):
        hf_amp.attach(accelerator, MixedPrecisionConfig(half_parameters="error"))
    assert vars(accelerator) == before
    hf_amp.attach(accelerator)
    assert dtypes(model) == {torch.float32}


@pytest.mark.parametrize("mode", [PrecisionMode.MIXED, PrecisionMode.FP16])
def test_conversion_inside_ddp_is_too_late(mode: PrecisionMode) -> None:
    """DDP hooks onto gradients by dtype: a conversion after it is refused, with the way that works."""
    model = tiny_mlp().to(torch.bfloat16)
    config = MixedPrecisionConfig(precision_mode=mode)
    with pytest.raises(AttachError, match=r"attach hf_amp before accelerator.prepare|Attach hf_amp before") as raised:
        convert_parameters(model, config, mode, [], MasterWeights(), fixed=True)
    assert "callbacks=[MixedPrecisionCallback(...)]" in str(raised.value)
    assert dtypes(model) == {torch.bfloat16}


def test_why_it_is_too_late() -> None:
    """A change of dtype gives a parameter a new gradient accumulator, without the hook that DDP has on the old one."""
    weight, calls = nn.Parameter(torch.ones(2, dtype=torch.float16)), []
    accumulator = torch.autograd.graph.get_gradient_edge(weight).node
    accumulator.register_hook(lambda *_: calls.append(1))
    weight.sum().backward()
    weight.grad, weight.data = None, weight.data.float()
    weight.sum().backward()
    assert calls == [1]


@pytest.mark.gpu
def test_stock_trainer_cannot_unscale_bf16_parameters(tmp_path: Path) -> None:
    """fp16=True on a BF16 model: stock stops at a kernel that CUDA does not have; with the callback it trains in FP32."""
    options = {"use_cpu": False, "max_steps": 2}
    with pytest.raises((NotImplementedError, RuntimeError), match="BFloat16"):
        trainer_on(loaded(tmp_path / "stock", torch.bfloat16), tmp_path, **options).train()
    callback = MixedPrecisionCallback()
    trainer_on(loaded(tmp_path / "ours", torch.bfloat16), tmp_path, callback, **options).train()
    assert callback.session.metrics()["applied_steps"] > 0
