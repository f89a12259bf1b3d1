"""The trainers of TRL with the callback: they train as without it, and what overflows beside a reference model is told right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainerCallback, set_seed

from hf_amp import AmpEvent, Cause, EventKind, MixedPrecisionCallback
from hf_amp.cli.demo_training import text_blocks
from tests.fallback.rescaled import ZOO
from tests.integrations import trainers
from tests.integrations.trainers import logged
from tests.reference import assert_bitwise_equal

trl = pytest.importorskip("trl", reason="needs trl, which the extra hf_amp[peers] brings")

pytestmark = pytest.mark.usefixtures("fresh_accelerator_state", "no_telemetry")
LLAMA = next(model for model in ZOO if model.name == "Llama")
OVERFLOWING = tuple(
    f"model.layers.{layer}.{writer}" for layer in (0, 1) for writer in ("self_attn.o_proj", "mlp.down_proj")
)
"""What writes to the residual stream, which the factors of `LLAMA` drive out of FP16's range."""
STEPS = 4


@pytest.fixture
def no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL tells its makers of every trainer but those in CI."""
    monkeypatch.setenv("CI", "true")


def llama(overflows: bool = False) -> LlamaForCausalLM:
    """Two layers over bytes and two special tokens; equal at every call, and the same function if it overflows FP16."""
    model = LLAMA.plain(seed=0)
    model.resize_token_embeddings(258, mean_resizing=False)
    if overflows:
        LLAMA.rescaling.apply(model)
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for every byte, one to end with and one to pad with."""
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<end>", "<pad>"]
    inner = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<pad>")


def rows(*columns: str) -> Dataset:
    """32 rows of real text: prompts of 12 bytes, what follows, and that backwards as what is rejected."""
    texts = [bytes(block).decode("ascii", "replace") for block in text_blocks()[:32]]
    every = {
        "text": [text[:32] for text in texts],
        "prompt": [text[:12] for text in texts],
        "chosen": [text[12:28] for text in texts],
        "rejected": [text[28:12:-1] for text in texts],
    }
    return Dataset.from_dict({column: every[column] for column in columns})


def arguments(of: type, folder: Path, precision: str, **options: Any) -> Any:
    """Those of a short run in this precision."""
    precisions = {"fp16": precision == "fp16", "bf16": precision == "bf16"}
    return trainers.arguments(folder, of, max_steps=STEPS, **precisions, **options)


def adapters() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


def sft_with_lora(folder: Path, precision: str, callbacks: list[Any]) -> Trainer:
    return trl.SFTTrainer(
        llama(),
        arguments(trl.SFTConfig, folder, precision, gradient_accumulation_steps=2),
        train_dataset=rows("text"),
        processing_class=tokenizer(),
        peft_config=adapters(),
        callbacks=callbacks,
    )


def dpo(
    folder: Path,
    precision: str,
    callbacks: list[Any],
    overflows: bool = False,
    reference_overflows: bool = False,
    lora: bool = False,
) -> Trainer:
    return trl.DPOTrainer(
        llama(overflows),
        None if lora else llama(reference_overflows),
        arguments(trl.DPOConfig, folder, precision),
        train_dataset=rows("prompt", "chosen", "rejected"),
        processing_class=tokenizer(),
        peft_config=adapters() if lora else None,
        callbacks=callbacks,
    )


def distinct_letters(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(completion))) for completion in completions]


def grpo(
    folder: Path, precision: str, callbacks: list[Any], reward: Any = distinct_letters, overflows: bool = False
) -> Trainer:
    """Generates before every second step, and takes each batch twice."""
    options = {"num_generations": 4, "max_completion_length": 8, "steps_per_generation": 1, "num_iterations": 2}
    return trl.GRPOTrainer(
        llama(overflows),
        reward,
        arguments(trl.GRPOConfig, folder, precision, **options),
        train_dataset=rows("prompt"),
        processing_class=tokenizer(),
        callbacks=callbacks,
    )


def trained(make: Callable[..., Trainer], *given: Any, **options: Any) -> Trainer:
    set_seed(0)
    trainer = make(*given, **options)
    trainer.train()
    return trainer


def reported(callback: MixedPrecisionCallback, kind: EventKind) -> list[AmpEvent]:
    assert callback.session is not None
    return [event for event in callback.session.events if event.kind is kind]


@pytest.mark.parametrize(("make", "precision"), [(sft_with_lora, "bf16"), (dpo, "no"), (grpo, "bf16")])
def test_without_faults_it_is_as_without_the_callback(
    make: Callable[..., Trainer], precision: str, tmp_path: Path
) -> None:
    """Parameters to the last bit, losses, and whatever else TRL logs but times."""
    stock = trained(make, tmp_path / "stock", precision, [])
    ours = trained(make, tmp_path / "ours", precision, [MixedPrecisionCallback()])
    assert_bitwise_equal(list(stock.model.parameters()), list(ours.model.parameters()))
    for before, after in zip(stock.state.log_history, ours.state.log_history, strict=True):
        kept = [key for key in before if "time" not in key and "second" not in key]
        assert {key: after[key] for key in kept} == {key: before[key] for key in kept}


@pytest.mark.parametrize("make", [sft_with_lora, dpo, grpo])
def test_fp16_learns_what_fp32_does(make: Callable[..., Trainer], tmp_path: Path) -> None:
    """Every loss, of the trained model and of what it is compared with, within a rounding of FP16."""
    callback = MixedPrecisionCallback()
    exact = trained(make, tmp_path / "exact", "no", [])
    half = trained(make, tmp_path / "half", "fp16", [callback])
    assert logged(half, "loss") == pytest.approx(logged(exact, "loss"), abs=0.02)
    assert callback.session.metrics()["applied_steps"] == STEPS
    assert not reported(callback, EventKind.STEP_SKIPPED)


@pytest.mark.parametrize(("overflows", "reference_overflows"), [(False, True), (True, True)])
def test_dpo_tells_the_model_and_its_reference_apart(
    overflows: bool, reference_overflows: bool, tmp_path: Path
) -> None:
    """Each that overflows costs one step, is named, and runs its modules in FP32 from then on."""
    callback = MixedPrecisionCallback()
    trained(dpo, tmp_path, "fp16", [callback], overflows=overflows, reference_overflows=reference_overflows)
    expected = [OVERFLOWING] if overflows else []
    if reference_overflows:
        expected.append(tuple(f"eval_model_1.{name}" for name in OVERFLOWING))
    skips = reported(callback, EventKind.STEP_SKIPPED)
    assert [(skip.cause, skip.modules) for skip in skips] == [(Cause.ACTIVATION, names) for names in expected]
    assert callback.session.metrics()["applied_steps"] == STEPS - len(expected)


def test_dpo_with_adapters_has_one_model(tmp_path: Path) -> None:
    """The reference is the model without its adapters: one step is lost, and modules are named inside of peft's."""
    callback = MixedPrecisionCallback()
    trained(dpo, tmp_path, "fp16", [callback], overflows=True, lora=True)
    (skip,) = reported(callback, EventKind.STEP_SKIPPED)
    names = tuple(f"base_model.model.{name}" + (".base_layer" if "down_proj" in name else "") for name in OVERFLOWING)
    assert (skip.cause, skip.modules) == (Cause.ACTIVATION, names)


class RescaleBefore(TrainerCallback):
    """Makes the model overflow FP16, without changing its function, before a step (from 1)."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self._step:
            LLAMA.rescaling.apply(kwargs["model"])


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_grpo_generates_under_the_plan(tmp_path: Path) -> None:
    """What overflows in a step on generated text is named, the next generation runs it in FP32; detach takes all hooks."""
    stock = trained(grpo, tmp_path / "stock", "no", [])
    callback = MixedPrecisionCallback()
    trainer = trained(grpo, tmp_path / "ours", "fp16", [callback, RescaleBefore(2)])
    (skip,) = reported(callback, EventKind.STEP_SKIPPED)
    assert (skip.step, skip.cause, skip.modules) == (2, Cause.ACTIVATION, OVERFLOWING)
    assert callback.session.metrics()["applied_steps"] == STEPS - 1
    callback.session.detach()
    assert hooks_on(trainer.model) == hooks_on(stock.model)


def test_grpo_of_a_model_that_overflows_from_the_start_generates_again(tmp_path: Path) -> None:
    """Sampling raises on NaN before the first step, which ends stock's run: the modules are named, and the text is made in FP32."""
    callback = MixedPrecisionCallback()
    trainer = trained(grpo, tmp_path, "fp16", [callback], overflows=True)
    (raised,) = reported(callback, EventKind.FORWARD_RAISED)
    assert raised.cause is Cause.ACTIVATION
    assert set(OVERFLOWING) <= set(raised.modules)
    assert callback.session.metrics()["applied_steps"] == trainer.state.global_step == STEPS
    callback.session.detach()
    assert "generate" not in vars(trainer.model)


def test_equal_rewards_are_named_where_nothing_is_learned(tmp_path: Path) -> None:
    """GRPO learns from differences within a group: without any, every gradient is zero, and labels are not all there is."""
    callback = MixedPrecisionCallback()
    trained(grpo, tmp_path, "fp16", [callback], reward=lambda completions, **_: [1.0] * len(completions))
    (zero,) = reported(callback, EventKind.ZERO_GRADIENTS)
    assert "rewards" in zero.message


class CastsInPlace(TrainerCallback):  # type: ignore[misc]
    """What TRL's continuous batching does to the model that trains, once, to generate from it (TRL #7268 and #6005)."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **others: Any) -> None:
        if state.global_step == self.step:
            model.to(torch.bfloat16)


def frozen_in(trainer: Trainer, callback: MixedPrecisionCallback) -> AmpEvent:
    trainer.train()
    (event,) = [event for event in callback.session.events if event.kind is EventKind.FROZEN]
    return event


def test_a_dora_magnitude_in_bf16_is_named(tmp_path: Path) -> None:
    """SFT with DoRA whose adapters are BF16, as TRL casts them: the magnitudes stand still, and are named within 20 steps."""
    callback = MixedPrecisionCallback()
    config = LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(llama().to(torch.bfloat16), config, autocast_adapter_dtype=False)
    options = arguments(trl.SFTConfig, tmp_path, "bf16", learning_rate=1e-4)
    options.max_steps = 20
    trainer = trl.SFTTrainer(
        model, options, train_dataset=rows("text"), processing_class=tokenizer(), callbacks=[callback]
    )
    event = frozen_in(trainer, callback)
    magnitudes = {name for name, _ in model.named_parameters() if "magnitude" in name}
    assert len(magnitudes) == 4
    assert magnitudes <= set(event.modules)
    assert not any("lora_B" in name for name in event.modules)


@pytest.mark.parametrize(("step", "optimizer"), [(0, "adamw_torch"), (14, "adafactor")])
def test_a_model_cast_in_place_is_named(tmp_path: Path, step: int, optimizer: str) -> None:
    """A model that is cast to BF16 while it trains: what stands still from then on is named within 20 steps."""
    callback = MixedPrecisionCallback()
    rates = {"learning_rate": 1e-6, "lr_scheduler_type": "constant"}
    options = arguments(trl.SFTConfig, tmp_path, "bf16", optim=optimizer, **rates)
    options.max_steps = step + 21
    casts = CastsInPlace(step)
    trainer = trl.SFTTrainer(
        llama(), options, train_dataset=rows("text"), processing_class=tokenizer(), callbacks=[callback, casts]
    )
    event = frozen_in(trainer, callback)
    assert step < event.step <= step + 20
    assert "model.norm.weight" in event.modules
