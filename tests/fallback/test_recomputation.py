"""Gradient checkpointing recomputes in the precision that the plan gave the forward pass."""

from __future__ import annotations

import copy
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer, TrainerCallback, set_seed

import hf_amp
from hf_amp import AmpSession, MixedPrecisionCallback, PrecisionMode
from hf_amp.fallback.plan import PrecisionPlan
from tests.each import for_each
from tests.fallback.test_module_precision import leave_for_fp32
from tests.integrations.trainers import arguments, text_rows

TOKENS = torch.randint(256, (2, 8), generator=torch.Generator().manual_seed(1))


def tiny_qwen(dtype: torch.dtype, adapters: bool = False) -> Any:
    """Two layers of width 16 in `dtype`; with FP32 adapters on a frozen body where asked for."""
    torch.manual_seed(0)
    model: Any = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=256, hidden_size=16, intermediate_size=32,
            num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
        )
    ).to(dtype)  # fmt: skip
    if adapters:
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "v_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        model.enable_input_require_grads()
    return model


def gradient_of(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])


def attached(loop: str, precision: PrecisionMode, model: nn.Module) -> AmpSession:
    """A session on `model`, which trains nothing yet."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.0)
    if loop == "by hand":
        return AmpSession.for_model(model, optimizer, precision_mode=precision)
    names = {PrecisionMode.BF16: "bf16", PrecisionMode.MIXED: "fp16"}
    accelerator = Accelerator(cpu=True, mixed_precision=names[precision])
    session = hf_amp.attach(accelerator)
    accelerator.prepare(model, optimizer)
    return session


def plan_of(session: AmpSession, ending: str) -> PrecisionPlan:
    """FP32 in the modules whose names end so; of the whole model where it is empty."""
    if not ending:
        return PrecisionPlan(PrecisionMode.FP32)
    names = [name for name, _ in session._fallback.runner.named_modules() if name.endswith(ending)]
    return PrecisionPlan(session.plan.default, MappingProxyType(dict.fromkeys(names, PrecisionMode.FP32)))


@pytest.mark.parametrize("precision", [PrecisionMode.BF16, PrecisionMode.MIXED])
@pytest.mark.parametrize("adapters", [False, True], ids=["all trained", "LoRA"])
@for_each("loop", ["accelerate", "by hand"])
@for_each("dtype", [torch.bfloat16, torch.float16])
@for_each("reentrant", [False, True])
@for_each("ending", ["", "mlp", "layers.0", "model"])
def test_half_parameters_under_checkpointing_train_in_fp32(
    precision: PrecisionMode, adapters: bool, loop: str, dtype: torch.dtype, reentrant: bool, ending: str
) -> None:
    """After a fallback, loss and gradients are those of the FP32 model without checkpointing, within rounding."""
    model = tiny_qwen(dtype, adapters)
    reference = copy.deepcopy(model).float().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    session = attached(loop, precision, model.train())
    session._fallback.runner.apply(plan_of(session, ending))
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    session.scaler.scale(loss).backward()
    expected = reference(input_ids=TOKENS, labels=TOKENS).loss
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    found, wanted = gradient_of(model) / session.scaler.get_scale(), gradient_of(reference)
    # What stays in half precision around the modules is rounded in every layer.
    assert (found - wanted).norm() < (0.05 if ending else 0.01) * wanted.norm()
    session.detach()
    assert not any(
        module._forward_pre_hooks or module._forward_hooks for module in model.get_decoder().layers.modules()
    )


@for_each("dtype", [torch.bfloat16, torch.float16])
@for_each("reentrant", [False, True])
def test_an_fp32_session_by_hand_recomputes_half_parameters_in_fp32(dtype: torch.dtype, reentrant: bool) -> None:
    model = tiny_qwen(dtype)
    reference = copy.deepcopy(model).float().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    attached("by hand", PrecisionMode.FP32, model.train())
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    reference(input_ids=TOKENS, labels=TOKENS).loss.backward()
    found, wanted = gradient_of(model), gradient_of(reference)
    assert (found - wanted).norm() < 0.01 * wanted.norm()


def test_the_step_after_a_repeated_one_may_leave_fp16() -> None:
    """What a repetition recomputes does not count for the next backward, which is not in FP16 any more."""
    model = tiny_qwen(torch.float32).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    session = AmpSession.for_model(model, optimizer, precision_schedule={0: "FP16", 1: "BF16"}, total_steps=2)
    for step in range(2):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        session.scaler.scale(loss + (loss * 0).sqrt() if step == 0 else loss).backward()
        session.scaler.step(optimizer)
        session.scaler.update()
        optimizer.zero_grad()
    assert session.metrics()["applied_steps"] == 1
    session.detach()


class LeavesAt(TrainerCallback):
    """Has the whole model leave for FP32 after the step of this number, as when overflows go on whose modules are not known."""

    def __init__(self, callback: MixedPrecisionCallback, step: int) -> None:
        self.callback, self.step = callback, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and self.callback.session.requested_mode is PrecisionMode.BF16:
            leave_for_fp32(self.callback.session)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("adapters", [False, True], ids=["all trained", "LoRA"])
def test_a_trainer_goes_on_after_the_whole_model_leaves_bf16(tmp_path: Path, adapters: bool, reentrant: bool) -> None:
    """A BF16 Trainer on BF16 parameters with checkpointing: FP32 from step 4 on, and the losses of an FP32 model."""
    losses = {}
    for dtype in (torch.bfloat16, torch.float32):
        set_seed(0)
        is_half = dtype == torch.bfloat16
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        callback = MixedPrecisionCallback(fallback_threshold=0.01)
        model = tiny_qwen(torch.bfloat16, adapters)
        trainer = Trainer(
            model if is_half else model.float(),
            arguments(tmp_path, fp16=False, bf16=is_half, **(options if is_half else {})),
            train_dataset=text_rows(),
            callbacks=[callback, LeavesAt(callback, 3)],
        )
        trainer.train()
        assert callback.session.plan.default is PrecisionMode.FP32
        losses[dtype] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses[torch.bfloat16]) == 6
    assert losses[torch.bfloat16][3:] == pytest.approx(losses[torch.float32][3:], rel=1e-2)
