"""Modules in FP32 by choice: from the first step, in any half-precision run, for good."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import hf_amp
from hf_amp import AmpSession, ConfigError, EventKind, MixedPrecisionCallback, MixedPrecisionConfig, PrecisionMode
from hf_amp.report.reader import read_run
from hf_amp.report.verdict import Level, verdict_on
from tests.each import for_each
from tests.integrations.trainers import regression_trainer

TOKENS = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(1))
pytestmark = pytest.mark.usefixtures("fresh_accelerator_state")


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=16, **sizes)).train()


def head_error(model: LlamaForCausalLM, run: Any) -> float:
    """How far the head's output is from that of FP32 arithmetic on what it is given."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = model.lm_head.register_forward_hook(lambda module, given, output: seen.append((given[0], output)))
    run()
    handle.remove()
    (given, output), *_ = seen
    exact = nn.functional.linear(given.double(), model.lm_head.weight.double())
    return float((output.double() - exact).abs().max())


@for_each("precision", ["fp16", "bf16"])
@for_each("patterns", [["lm_head"], ["*_head"], [nn.Linear], ["Linear"]])
def test_the_head_computes_in_fp32(precision: str, patterns: list[Any]) -> None:
    """By name, glob and class; its output is exact to FP32's digits, and without the option it is not."""
    errors = {}
    for chosen in ([], patterns):
        accelerator = Accelerator(mixed_precision=precision, cpu=True)
        with hf_amp.attach(accelerator, fp32_modules=chosen) as session:
            model = accelerator.prepare(tiny_llama())
            errors[bool(chosen)] = head_error(model, lambda model=model: model(input_ids=TOKENS))
            if chosen:
                assert session.plan.modules["lm_head"] is PrecisionMode.FP32
                changes = [e for e in session.events if e.kind is EventKind.PRECISION_CHANGED]
                assert [(e.step, e.cause, e.after) for e in changes] == [(0, None, "FP32")]
                assert "because fp32_modules says so" in changes[0].message
                assert session.metrics()["modules_in_fp32"] == len(session.plan.modules)
                assert session.metrics()["precision_changes"] == 0
    assert errors[True] < 1e-6 < errors[False]


def test_they_are_not_tried_again(tmp_path: Path) -> None:
    """After many times `recovery_steps` clean steps they are still in FP32, and the verdict finds nothing to look at."""
    callback = MixedPrecisionCallback(fp32_modules=["Linear"], recovery_steps=1, init_scale=64.0)
    trainer = regression_trainer(tmp_path, callback, fp16=True, max_steps=10)
    trainer.train()
    assert set(callback.session.plan.modules.values()) == {PrecisionMode.FP32}
    assert verdict_on(read_run(tmp_path)).level is Level.SOUND
    callback.session.detach()
    assert not callback.session.plan.modules or callback.session._fallback.runner._inner == {}


def test_what_nobody_is_called_is_an_error_before_the_first_step() -> None:
    """With what is near."""
    model = tiny_llama()
    session = AmpSession.for_model(model, torch.optim.SGD(model.parameters(), lr=0.1), fp32_modules=["lmhead"])
    with pytest.raises(ConfigError, match=r"no module is called 'lmhead'.*near it are lm_head"):
        session.scaler.scale(model(input_ids=TOKENS, labels=TOKENS).loss)


@for_each("wrong", ["lm_head", [1], {"lm_head": True}, [""]])
def test_a_wrong_list_is_an_error(wrong: Any) -> None:
    """It says what is allowed."""
    with pytest.raises(ConfigError, match="a list of names, globs or classes of modules"):
        MixedPrecisionConfig(fp32_modules=wrong)


def test_a_config_that_was_saved_has_them() -> None:
    """As JSON has lists."""
    config = MixedPrecisionConfig(fp32_modules=["a", nn.LayerNorm])
    assert config.to_dict()["fp32_modules"] == ["a", "LayerNorm"]
    assert MixedPrecisionConfig.from_dict(config.to_dict()) == config


def test_a_state_from_before_the_choice_follows_it() -> None:
    """And one with a module that has fallen back keeps that as well."""
    states = []
    for chosen in ([], ["lm_head"]):
        model = tiny_llama()
        session = AmpSession.for_model(model, torch.optim.SGD(model.parameters(), lr=0.1), fp32_modules=chosen)
        states.append((session, session.state_dict()))
    (_, former), (session, _) = states
    session.load_state_dict(former)
    assert dict(session.plan.modules) == {"lm_head": PrecisionMode.FP32}
