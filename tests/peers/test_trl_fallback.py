"""TRL's trainers go through a fallback of modules and of the whole model, on half-precision models, and train on."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaForSequenceClassification, Trainer, TrainerCallback, set_seed

from hf_amp import EventKind, MixedPrecisionCallback, PrecisionMode
from hf_amp.fallback.plan import PrecisionPlan
from tests.integrations.trainers import logged
from tests.peers.test_trl import STEPS, arguments, distinct_letters, llama, rows, tokenizer

trl = pytest.importorskip("trl", reason="needs trl, which the extra hf_amp[peers] brings")

pytestmark = pytest.mark.usefixtures("fresh_accelerator_state", "no_telemetry")
COLUMNS = {
    "SFT": ("text",),
    "DPO": ("prompt", "chosen", "rejected"),
    "Reward": ("chosen", "rejected"),
    "GRPO": ("prompt",),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
EVERY = list(product(COLUMNS, DTYPES, ["no checkpointing", "reentrant", "not reentrant"], ["LoRA", "all trained"]))
SOME = [EVERY[index] for index in (11, 15, 30, 38)]
"""One of each trainer, in which every other choice occurs."""


@pytest.fixture
def no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL tells its makers of every trainer but those in CI."""
    monkeypatch.setenv("CI", "true")


class Falls(TrainerCallback):
    """Puts the modules named `mlp` in FP32 before step 2, and the whole model before step 3, as the fallback does."""

    def __init__(self, amp: MixedPrecisionCallback) -> None:
        self._amp = amp

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        runner = self._amp.session._fallback.runner
        names = [name for name, _ in runner.named_modules() if name.endswith("mlp")]
        assert names
        if state.global_step == 1:
            runner.apply(PrecisionPlan(runner.plan.default, MappingProxyType(dict.fromkeys(names, PrecisionMode.FP32))))
        if state.global_step == 2:
            runner.apply(PrecisionPlan(PrecisionMode.FP32))


def made(name: str, precision: str, checkpointing: str, trained: str, folder: Path, callbacks: list[Any]) -> Trainer:
    """The trainer of that name, on a small Llama whose parameters are in the precision of the run."""
    options: dict[str, Any] = {"learning_rate": 1e-3}
    if checkpointing != "no checkpointing":
        options["gradient_checkpointing"] = True
        options["gradient_checkpointing_kwargs"] = {"use_reentrant": checkpointing == "reentrant"}
    if name == "GRPO":
        options.update(num_generations=4, max_completion_length=8)
    model: Any = llama()
    if name == "Reward":
        model.config.num_labels, model.config.pad_token_id = 1, tokenizer().pad_token_id
        model = LlamaForSequenceClassification(model.config)
    task = "SEQ_CLS" if name == "Reward" else "CAUSAL_LM"
    adapters = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type=task)
    more: dict[str, Any] = {"reward_funcs": distinct_letters} if name == "GRPO" else {}
    if name == "DPO" and trained == "all trained":
        more["ref_model"] = llama().to(DTYPES[precision])
    return getattr(trl, f"{name}Trainer")(
        model.to(DTYPES[precision]),
        **more,
        args=arguments(getattr(trl, f"{name}Config"), folder, precision, **options),
        train_dataset=rows(*COLUMNS[name]),
        processing_class=tokenizer(),
        peft_config=adapters if trained == "LoRA" else None,
        callbacks=callbacks,
    )


def test_trainers_of_trl_train_on_after_a_fallback(full_size: bool, tmp_path: Path) -> None:
    """All steps are applied with finite losses; parameters move in the last one, which runs in FP32."""
    for index, choice in enumerate(EVERY if full_size else SOME):
        set_seed(0)
        amp = MixedPrecisionCallback(init_scale=64.0)
        trainer = made(*choice, tmp_path / str(index), [amp, Falls(amp)])
        trainer.train()
        assert amp.session.metrics()["applied_steps"] == STEPS, choice
        assert not [event for event in amp.session.events if event.kind is EventKind.STEP_SKIPPED], choice
        losses = logged(trainer, "loss")
        assert len(losses) == STEPS, choice
        assert all(map(torch.isfinite, map(torch.tensor, losses))), choice
        assert logged(trainer, "grad_norm")[-1] > 0 or choice[0] == "GRPO", choice
