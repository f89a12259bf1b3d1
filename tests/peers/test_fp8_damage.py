"""FP8 runs by torchao name the layers that do damage, by themselves: against each layer tried by hand, in real models."""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import AORecipeKwargs
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.modeling_outputs import SequenceClassifierOutput

import hf_amp
from hf_amp import AmpEvent, AmpSession, MixedPrecisionCallback
from hf_amp.choose import SHARE_OF_ROUNDING, _Float8Trials, is_float8
from hf_amp.report.reader import read_run
from hf_amp.report.verdict import Level, verdict_on
from tests.each import for_each, forget_accelerators
from tests.forking import told_by_ranks
from tests.reference import assert_bitwise_equal, snapshot

float8 = pytest.importorskip("torchao.float8", reason="needs torchao, which the extra hf_amp[peers] brings")

pytestmark = pytest.mark.usefixtures("fresh_accelerator_state")

IDS = torch.randint(0, 512, (4, 32), generator=torch.Generator().manual_seed(0))
TOKENS = {"input_ids": IDS, "labels": IDS}
SMALL: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
UP, GATE = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.gate_proj"
Build = Callable[[], tuple[nn.Module, dict[str, Tensor]]]


def llama(**options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """With 13 layers that accelerate converts: all but the first query projection and the head."""
    torch.manual_seed(0)
    sizes = {**SMALL, "vocab_size": 512, "intermediate_size": 128, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **options})), TOKENS


def bert(**options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=512, intermediate_size=128, **SMALL, **options)
    return BertForSequenceClassification(config), {"input_ids": IDS, "labels": torch.tensor([0, 1, 0, 1])}


def family(model: Any, config: Any, **options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    pixels = {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.arange(4)}
    return model(config(**options)), pixels if config is ViTConfig else TOKENS


FAMILIES: dict[str, Build] = {
    "llama": llama,
    "bert": bert,
    "opt": functools.partial(
        family, OPTForCausalLM, OPTConfig, vocab_size=512, ffn_dim=128, word_embed_proj_dim=64, **SMALL
    ),
    "neox": functools.partial(
        family, GPTNeoXForCausalLM, GPTNeoXConfig, vocab_size=512, intermediate_size=128, **SMALL
    ),
    "vit": functools.partial(
        family, ViTForImageClassification, ViTConfig, intermediate_size=128, image_size=32, patch_size=8, num_labels=10, **SMALL
    ),
    "t5": functools.partial(
        family, T5ForConditionalGeneration, T5Config, vocab_size=512, d_model=64, d_ff=128, num_layers=2, num_heads=4, d_kv=16,
        decoder_start_token_id=0,
    ),
}  # fmt: skip


def large_weights(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A Llama whose layer of that name has weights of 10,000 on a feature that is 0: FP8's one scale for all follows them."""
    model, batch = llama()
    block, part = name.rpartition(".")[0].rsplit(".", 1)
    norm = model.get_submodule(block).get_submodule("post_attention_layernorm" if part == "mlp" else "input_layernorm")
    with torch.no_grad():
        norm.weight[0] = 0  # type: ignore[index,operator]
        model.get_submodule(name).weight[:, 0] = 1e4  # type: ignore[index,operator]
    norm.requires_grad_(False)
    return model, batch


def large_activations() -> tuple[nn.Module, dict[str, Tensor]]:
    """A Llama in which a feature of 100,000 goes into two layers, neither of which uses it."""
    model, batch = llama(initializer_range=0.1)
    layer = model.model.layers[1]  # type: ignore[union-attr,index,operator]
    with torch.no_grad():
        layer.post_attention_layernorm.weight[0] = 1e5
        layer.mlp.up_proj.weight[:, 0] = layer.mlp.gate_proj.weight[:, 0] = 0
    return model, batch


def amplified_rounding() -> tuple[nn.Module, dict[str, Tensor]]:
    """A Llama whose queries are so large that the rounding of the keys decides what is attended to."""
    model, batch = llama()
    with torch.no_grad():
        model.get_submodule("model.layers.0.self_attn.q_proj").weight[0, 0] = 1e4  # type: ignore[index,operator]
    return model, batch


def accelerator() -> Accelerator:
    """In FP8 on the CPU, which torchao emulates."""
    forget_accelerators()
    recipe = AORecipeKwargs(config=float8.Float8LinearConfig(emulate=True))
    return Accelerator(mixed_precision="fp8", kwargs_handlers=[recipe], cpu=True)


def train(build: Build, steps: int = 3, **options: Any) -> tuple[nn.Module, AmpSession]:
    """Steps that move nothing, so that what was planted stays as it is."""
    given, batch = build()
    runner = accelerator()
    session = hf_amp.attach(runner, **options)
    model, optimizer = runner.prepare(given, torch.optim.SGD(given.parameters(), lr=0.0))
    for _ in range(steps):
        runner.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    return model, session


def found(session: AmpSession) -> AmpEvent:
    """The one event of a session that speaks of what FP8 does."""
    (event,) = [each for each in session.events if each.kind.value.startswith("fp8_")]
    return event


def tried_by_hand(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, float]:
    """Layer → how much it moves the logits alone in FP8, as a share of their size; "" for all of them together."""

    def logits(narrow: Sequence[str]) -> Tensor:
        held = copy.deepcopy(model)
        for name, module in held.named_modules():
            if is_float8(module) and name not in narrow:
                module.__class__ = nn.Linear
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            x = held(**batch).logits.float().flatten(0, -2)
        return x - x.mean(-1, keepdim=True)

    names = [name for name, module in model.named_modules() if is_float8(module)]
    exact = logits([])
    sets = {**{name: [name] for name in names}, "": names}
    return {name: ((logits(each) - exact).norm() / exact.norm()).item() for name, each in sets.items()}


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (functools.partial(large_weights, UP), [UP]),
        (functools.partial(large_weights, "model.layers.0.self_attn.v_proj"), ["model.layers.0.self_attn.v_proj"]),
        (large_activations, [GATE, UP]),
        (amplified_rounding, ["model.layers.0.self_attn.k_proj"]),
    ],
)
def test_the_layers_that_do_damage_are_named(build: Build, names: list[str]) -> None:
    """Those, and no others, are the worst of all layers tried by hand, with their shares; left out, as the event says, FP8 does no damage."""
    model, session = train(build)
    event = found(session)
    by_hand = tried_by_hand(model, build()[1])
    assert (event.kind.value, event.step, set(event.modules)) == ("fp8_damage", 2, set(names))
    everything = by_hand.pop("")
    assert set(sorted(by_hand, key=lambda name: -by_hand[name])[: len(names)]) == set(names)
    assert session.metrics()["fp8_output_error"] == pytest.approx(everything, rel=0.02)
    for name in names:
        (share,) = re.findall(rf"{name} by ([\d.]+)%", event.message)
        assert float(share) / 100 == pytest.approx(by_hand[name], rel=0.02)
    assert event.message.endswith(f"Start again with fp32_modules={list(event.modules)}.")
    after = found(train(build, fp32_modules=list(event.modules))[1])
    assert (after.kind.value, after.modules) == ("fp8_measured", ())
    assert after.figures["fp8_output_error"] < everything / 1.5


@pytest.mark.parametrize("name", FAMILIES)
def test_a_healthy_run_names_none(name: str) -> None:
    """In each layer of six families the error is that of rounding within a quarter, weighed by the loss; the event is a quiet one."""
    _, session = train(FAMILIES[name])
    event = found(session)
    assert (event.kind.value, event.modules, event.kind.needs_attention) == ("fp8_measured", (), False)
    assert "fp32_modules" not in event.message
    recorder, runner = session._fallback.recorder, session._fallback.runner
    recorder.is_paused = True
    effects, _ = _Float8Trials(recorder.forwards_of(3)[-1], runner.current, 1.0).effects()
    whole = math.hypot(*(rounding for _, rounding in effects.values()))
    assert all(abs(made - rounding) < 0.25 * max(rounding, whole / 4) for made, rounding in effects.values())
    assert all(made**2 - rounding**2 < (SHARE_OF_ROUNDING * whole / 4) ** 2 for made, rounding in effects.values())


def test_several_of_many_are_named_and_the_rest_counted() -> None:
    """Six layers are planted: three are tried alone and named, and the message says that there are three more."""

    def six() -> tuple[nn.Module, dict[str, Tensor]]:
        model, batch = llama(num_hidden_layers=3)
        with torch.no_grad():
            for layer in model.model.layers:  # type: ignore[union-attr]
                layer.post_attention_layernorm.requires_grad_(False).weight[0] = 0
                layer.mlp.up_proj.weight[:, 0] = layer.mlp.gate_proj.weight[:, 0] = 1e4
        return model, batch

    event = found(train(six)[1])
    assert len(event.modules) == 3
    assert all("mlp" in name and not name.endswith("down_proj") for name in event.modules)
    assert "3 more may need it" in event.message


def test_an_estimate_that_no_trial_confirms_names_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """With any excess over rounding enough for a trial, layers of a healthy model are tried, and none moves more than the others together."""
    monkeypatch.setattr(hf_amp.choose, "SHARE_OF_ROUNDING", 0.0)
    event = found(train(llama)[1])
    assert (event.kind.value, event.modules) == ("fp8_measured", ())
    assert "alone in FP8 moves them by less" in event.message


class Counting(LlamaForCausalLM):
    """Counts its passes where a replay does not put them back."""

    forwards = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        Counting.forwards += 1
        return super().forward(*args, **kwargs)


@for_each(("planted", "passes"), [(False, 2), (True, 4)])
def test_it_costs_so_many_forward_passes_once(planted: bool, passes: int) -> None:
    """Two, and four where one layer is to blame, with one backward; the steps after it have none, and nothing is left behind."""

    def build() -> tuple[nn.Module, dict[str, Tensor]]:
        model, batch = large_weights(UP) if planted else llama()
        model.__class__ = Counting
        return model, batch

    Counting.forwards = 0
    model, session = train(build, steps=6)
    assert Counting.forwards == 6 + passes
    assert session.scaler.observers == [session.on_step]
    assert session._fallback.recorder.without_backward == 0  # repeated passes are none of the loop's
    assert not any(hooks for module in list(model.modules())[1:] for hooks in [module._forward_hooks])


class Normed(nn.Module):
    """Batch norm, whose statistics every pass moves, between layers of which accelerate converts two."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(16, 32), nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 32), nn.Linear(32, 16)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(loss=self.layers(x).float().square().mean())


def normed() -> tuple[nn.Module, dict[str, Tensor]]:
    return Normed(), {"x": torch.randn(64, 16, generator=torch.Generator().manual_seed(1))}


@for_each("build", [functools.partial(bert, hidden_dropout_prob=0.2), normed])
def test_a_run_is_the_same_to_the_last_bit(build: Build) -> None:
    """Dropout draws the same numbers, buffers move as before, gradients accumulate, and all is as without hf_amp."""
    results = []
    for attached in (True, False):
        given, batch = build()
        runner = accelerator()
        session = hf_amp.attach(runner) if attached else None
        model, optimizer = runner.prepare(given, torch.optim.AdamW(given.parameters(), lr=1e-3, foreach=False))
        for step in range(8):
            runner.backward(model(**batch).loss / 2)
            if step % 2:
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
        assert session is None or "FP8 moves the outputs by" in found(session).message
        results.append([*snapshot(model, optimizer), *(x.clone() for x in model.buffers())])
    assert_bitwise_equal(*results)


def loop(model: nn.Module, loss_of: Callable[[Any], Tensor], batch: dict[str, Tensor], **options: Any) -> AmpSession:
    """Six steps of a loop in which the loss may be made outside of the model."""
    runner = accelerator()
    session = hf_amp.attach(runner, **options)
    prepared, optimizer = runner.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.0, fused=True))
    for _ in range(6):
        runner.backward(loss_of(prepared(**batch)))
        optimizer.step()
        optimizer.zero_grad()
    return session


def cross_entropy(output: Any) -> Tensor:
    return nn.functional.cross_entropy(output.logits.float()[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


@for_each("options", [{}, {"scaling_strategy": "PERFORMANCE_OPTIMIZED"}])
def test_a_loss_outside_of_the_model(options: dict[str, Any]) -> None:
    """What the loss gave to the outputs stands for it; also where the verdict on a step comes one late."""
    event = found(loop(large_weights(UP)[0], cross_entropy, {"input_ids": IDS}, **options))
    assert event.modules == (UP,)
    assert "loss" not in event.message


def test_with_gradient_checkpointing() -> None:
    """Backward runs the layers again, and each is counted once."""

    def build() -> tuple[nn.Module, dict[str, Tensor]]:
        model, batch = large_weights(UP)
        model.gradient_checkpointing_enable()  # type: ignore[operator]
        return model.train(), batch

    event, plain = found(train(build)[1]), found(train(functools.partial(large_weights, UP))[1])
    assert (event.modules, event.message) == (plain.modules, plain.message)


@for_each("build", [bert, llama])
def test_reentrant_checkpointing_is_said_to_hide_layers(build: Build) -> None:
    """Where backward does not come to the layers through checkpointing, none is named for what the others do."""

    def checkpointed() -> tuple[nn.Module, dict[str, Tensor]]:
        model, batch = build()
        model.gradient_checkpointing_enable({"use_reentrant": True})  # type: ignore[operator]
        return model.train(), batch

    event = found(train(checkpointed, steps=6)[1])
    assert (event.kind.value, event.modules, event.figures) == ("fp8_measured", (), {})
    assert "gradient checkpointing hides its layers" in event.message


def test_where_it_cannot_be_measured_it_says_why_and_names_none() -> None:
    """A hook of the user's would see passes that are no training; nothing is run, and the event says what measures."""
    model, seen = large_weights(UP)[0], list[Any]()
    model.get_submodule("model.layers.1.mlp").register_forward_hook(lambda module, given, output: seen.append(1))
    event = found(loop(model, lambda output: output.loss, TOKENS))
    assert (event.kind.value, event.modules, len(seen)) == ("fp8_measured", (), 6)
    assert "its modules have hooks" in event.message
    assert "choose_precision" in event.message


def test_it_is_switched_off_with_the_monitoring() -> None:
    """No event, and nothing waits for one."""
    _, session = train(functools.partial(large_weights, UP), enable_monitoring=False)
    assert not [each for each in session.events if each.kind.value.startswith("fp8_")]
    assert session.scaler.observers == [session.on_step]


def test_a_trainer_logs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the event log, the metrics and the report's verdict; the first step that is looked into is the next one applied after a skip."""
    from transformers import Trainer, TrainingArguments

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    forget_accelerators()
    model, _ = large_weights(UP)
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(8, 1)]
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, max_steps=5, per_device_train_batch_size=4, logging_steps=1, learning_rate=0.0,
        report_to="none", save_strategy="no",
    )  # fmt: skip
    callback = MixedPrecisionCallback(log_all_metrics=True)
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[callback])
    trainer.train()
    assert found(callback.session).modules == (UP,)
    run = read_run(tmp_path)
    assert run.latest["fp8_output_error"] == callback.session.metrics()["fp8_output_error"]
    assert "amp/fp8_output_error" in trainer.state.log_history[3]
    assert "fp8_damage" in trainer.state.log_history[1]["amp_incident"]
    verdict = verdict_on(run)
    assert verdict.level is Level.WATCH
    assert f"FP8 does damage in {UP}" in verdict.sentence


def test_two_ranks() -> None:
    """In DistributedDataParallel and under FSDP2 both name the layer, and weights are those without; where one rank cannot go on, none does."""
    for ddp, sharded, without, spoiled in told_by_ranks("tests.peers.fp8_worker"):
        for run in (ddp, sharded):
            assert [each[:3] for each in run["told"]] == [["fp8_damage", 2, [UP]]]
        assert sharded["weights"] == without["weights"] == spoiled["weights"]
        assert without["told"] == []
        ((kind, _, modules, message),) = spoiled["told"]
        assert (kind, modules) == ("fp8_measured", [])
        assert "the batch was written into since" in message
