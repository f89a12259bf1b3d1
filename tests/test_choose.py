"""`choose_precision` says what half kernels do, and finds the smallest set of modules that meets a bound."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, linear, scaled_dot_product_attention
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

import hf_amp
from hf_amp import (
    AmpSession,
    ConfigError,
    MixedPrecisionCallback,
    MixedPrecisionConfig,
    PrecisionMode,
    choose_precision,
)
from hf_amp.choose import SCALED_FORMATS, RoundedOperands, _rounded_to_tf32
from hf_amp.fallback.plan import PrecisionPlan
from tests.benchmarks.test_choose import MODELS, chosen_plan, configurations, out_of_order
from tests.each import for_each
from tests.integrations.trainers import arguments, text_rows, tiny_gpt2

BY_NAME = {entry.name: entry for entry in MODELS}
ROWS = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))


class Tower(nn.Module):
    """Four small products side by side, whose rounding matters more and more, and two large ones, which matter most, but less by product."""

    SHARES = (0.1, 0.3, 0.6, 1.0)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.steps = nn.ModuleList(nn.Linear(16, 16) for _ in self.SHARES)
        self.wide = nn.Sequential(nn.Linear(16, 256), nn.Tanh(), nn.Linear(256, 16))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        found = sum(share * step(x) for share, step in zip(self.SHARES, self.steps, strict=True)) + 3 * self.wide(x)
        labels = torch.zeros(len(x), dtype=torch.long) if labels is None else labels
        return {"logits": found, "loss": nn.functional.cross_entropy(found.float(), labels)}


# ---- what is emulated --------------------------------------------------------------------------------------------


def to_tf32(value: float) -> float:
    """By its definition: 11 significant bits, to nearest, ties away from zero."""
    if value == 0 or not math.isfinite(value):
        return value
    fraction, exponent = math.frexp(abs(value))
    return math.copysign(math.ldexp(math.floor(fraction * 2**11 + 0.5), exponent - 11), value)


def test_tf32_has_ten_bits_of_mantissa() -> None:
    """Against the definition, number by number; inf and NaN stay."""
    x = torch.cat(
        [
            torch.randn(200) * 10.0 ** torch.randint(-30, 30, (200,)),
            torch.tensor([0.0, 1 + 2**-11, -1 - 2**-11, math.inf]),
        ]
    )
    assert _rounded_to_tf32(x).tolist() == [to_tf32(value) for value in x.tolist()]
    assert _rounded_to_tf32(torch.tensor([math.nan])).isnan().all()


def test_operands_of_every_product_are_rounded() -> None:
    """Products, convolutions and attention see rounded operands, and nothing else does; an inner context acts alone."""
    torch.manual_seed(0)
    a, b, bias = torch.randn(2, 6, 8), torch.randn(5, 8), torch.randn(5)
    kernel, heads = torch.randn(3, 6, 2), torch.randn(2, 2, 6, 8)

    def results(r: Any) -> list[Tensor]:
        return [
            linear(r(a), r(b), bias), r(a[0]) @ r(b).T, r(a) @ r(a).mT, conv1d(r(a), r(kernel)),
            scaled_dot_product_attention(r(heads), r(heads), r(heads)),
        ]  # fmt: skip

    expected, exact = results(_rounded_to_tf32), results(lambda x: x)
    with RoundedOperands(_rounded_to_tf32):
        found = results(lambda x: x)
        with RoundedOperands(None):
            inside = results(lambda x: x)
        summed = a + 1
    assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, inside, exact))
    assert torch.equal(summed, a + 1)
    assert not any(map(torch.equal, found, exact))


@pytest.mark.parametrize("name", ["Llama", "ViT on digits", "Llama, large values"])
def test_its_order_is_that_of_half_kernels(name: str) -> None:
    """Six configurations of FP16 and BF16, after a few steps of training, overflow included, and each error nearly; and the plan, run by
    half kernels, has at most a fifth of BF16's error with at least 90% of the products in half precision."""
    entry = BY_NAME[name]
    model, batch = entry.trained(steps=3)
    batch = {name: x[:2] for name, x in batch.items()} if "input_ids" in batch else batch
    rows = configurations(entry, model, batch, inference=False)
    for row in rows:
        assert row["predicted"] == pytest.approx(row["measured"], rel=0.2), row
    assert out_of_order(rows) == 0
    found = chosen_plan(model, batch)
    assert found["error_over_BF16"] <= 0.2
    assert found["products_in_FP32"] <= 0.1
    assert found["plan"] == ("BF16, FP32 in lm_head" if "large" in name else "FP16")


# ---- what is chosen ----------------------------------------------------------------------------------------------


def test_products_are_counted_by_the_formula() -> None:
    """Rows times inputs times outputs, and a curve that goes from all of them to the plan."""
    _, table = choose_precision(Tower(), {"x": ROWS}, number_format="BF16", max_error=1e-9)
    total = 4 * 16 * 16 + 2 * 16 * 256
    shares = {module.module: module.products for module in table.modules}
    assert shares == {
        **{f"steps.{i}": pytest.approx(256 / total) for i in range(4)},
        "wide": pytest.approx(8192 / total), "wide.0": pytest.approx(4096 / total), "wide.2": pytest.approx(4096 / total),
    }  # fmt: skip
    assert table.number_format == "FP32"  # all of them are not half precision any more
    assert table.curve[0].half_products == 1
    assert [p.half_products for p in table.curve] == sorted((p.half_products for p in table.curve), reverse=True)


def test_the_set_is_the_smallest() -> None:
    """For every bound on the way, the products in FP32 are those of the best of all 64 sets of modules, each measured."""
    model, names = Tower(), [*(f"steps.{i}" for i in range(4)), "wide.0", "wide.2"]
    products = dict.fromkeys(names, 256) | {"wide.0": 4096, "wide.2": 4096}
    exact = model(ROWS)["logits"].log_softmax(-1)

    def measured(wide: tuple[str, ...]) -> float:
        """By real half kernels, each module by itself: the whole but these is in BF16."""
        twin = Tower()
        for name in names:
            layer = twin.get_submodule(name).to(torch.float32 if name in wide else torch.bfloat16)
            layer.register_forward_pre_hook(lambda layer, given: given[0].to(layer.weight.dtype))
        return (twin(ROWS)["logits"].float().log_softmax(-1) - exact).square().mean().sqrt().item()

    sets = [each for size in range(len(names) + 1) for each in itertools.combinations(names, size)]
    errors = {each: measured(each) for each in sets}
    whole = errors[()]
    for share in (0.9, 0.8, 0.6, 0.4, 0.1):
        plan, table = choose_precision(model, {"x": ROWS}, number_format="BF16", max_error=share * whole)
        best = min(sum(products[n] for n in each) for each, error in errors.items() if error <= share * whole)
        assert sum(products[name] for name in plan.modules) == best, (share, plan.modules)
        assert table.chosen.rms == pytest.approx(errors[tuple(n for n in names if n in plan.modules)], rel=0.05)
    widened = {module.module: module.widened for module in table.modules}
    for name in names:
        assert widened[name] == pytest.approx(errors[(name,)], rel=0.05)


def test_the_model_stays_as_it_is() -> None:
    """Parameters, mode, dtype and hooks."""
    model = tiny_gpt2().bfloat16().train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    choose_precision(model, {"input_ids": torch.tensor([text_rows()[0]["input_ids"]])})
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_tokens_that_count_are_those_of_the_labels() -> None:
    """The next token of a causal model, but for padding and for labels of -100; of other models the label itself, or all classes."""
    tokens = torch.tensor([row["input_ids"] for row in text_rows()[:3]])
    mask, labels = torch.ones_like(tokens), tokens.clone()
    mask[0, 20:], labels[1, :10] = 0, -100

    def count(model: nn.Module, **batch: Tensor) -> int:
        return choose_precision(model, batch)[1].tokens

    assert count(tiny_gpt2(), input_ids=tokens) == 3 * 31
    assert count(tiny_gpt2(), input_ids=tokens, attention_mask=mask) == 2 * 31 + 19
    assert count(tiny_gpt2(), input_ids=tokens, labels=labels) == 3 * 31 - 9
    assert count(Tower(), x=ROWS, labels=torch.zeros(32, dtype=torch.long)) == 32
    assert count(Tower(), x=ROWS) == 32 * 16


def test_a_loss_is_compared_row_by_row() -> None:
    """Root mean square and largest difference of the loss of each row, by hand."""
    labels = torch.arange(8)
    _, table = choose_precision(Tower(), {"x": ROWS[:8], "labels": labels}, metric="loss")
    with hf_amp.emulate(torch.bfloat16), torch.no_grad():
        found = torch.stack([Tower()(ROWS[i : i + 1], labels[i : i + 1])["loss"] for i in range(8)])
    exact = torch.stack([Tower()(ROWS[i : i + 1], labels[i : i + 1])["loss"] for i in range(8)])
    error = (found - exact).detach().double()
    assert table.tokens == 8
    assert table.formats["BF16"].rms == pytest.approx(error.square().mean().sqrt().item(), rel=1e-6)
    assert table.formats["BF16"].largest == pytest.approx(error.abs().max().item(), rel=1e-6)


def test_other_tools_get_their_settings() -> None:
    """A head in FP32 is what vLLM, SGLang and TRL have a word for; other modules are listed as what they have none for."""
    batch = {"input_ids": torch.tensor([row["input_ids"] for row in text_rows()[:4]])}
    _, table = choose_precision(tiny_gpt2(), batch, number_format="BF16", max_error=1.0)
    assert table.settings["vllm"] == {"dtype": "bfloat16"}
    head_alone = choose_precision(tiny_gpt2(), batch, number_format="BF16")[1]
    assert head_alone.settings["hf_amp"] == {"fp32_modules": ["lm_head"]}
    assert head_alone.settings["vllm"] == {"dtype": "bfloat16", "hf_overrides": {"head_dtype": "float32"}}
    assert head_alone.settings["sglang"]["enable_fp32_lm_head"] is True
    assert head_alone.settings["trl.GRPOConfig"] == {"bf16": True, "cast_lm_head_to_fp32": True}
    assert head_alone.settings["without_setting"]["vllm"] == []
    inference = choose_precision(tiny_gpt2(), batch, number_format="BF16", max_error=1e-2, inference=True)[1]
    assert "transformers.TrainingArguments" not in inference.settings
    json.dumps(head_alone.to_dict(), allow_nan=False)


def test_a_format_is_named_in_any_case() -> None:
    """As a user types it."""
    for name in ("bf16", "Fp8 e4m3"):
        _, table = choose_precision(Tower(), {"x": ROWS}, number_format=name, max_error=1.0)
        assert table.number_format == name.upper()


def test_a_plan_of_the_base_holds_for_its_lora_model() -> None:
    """PEFT's names have more in front; one that nothing is called stays an error."""
    peft = pytest.importorskip("peft", reason="needs peft, which the extra hf_amp[examples] brings")
    batch = {"input_ids": torch.tensor([row["input_ids"] for row in text_rows()[:4]])}
    plan, _ = choose_precision(tiny_gpt2(), batch, number_format="BF16")
    lora = peft.get_peft_model(tiny_gpt2(), peft.LoraConfig(target_modules=["c_attn"], task_type="CAUSAL_LM"))

    def session(**options: Any) -> AmpSession:
        optimizer = torch.optim.AdamW(lora.parameters())
        return AmpSession.for_model(lora, optimizer, MixedPrecisionConfig(emulate=True, **options))

    assert dict(session(plan=plan).plan.modules) == {"base_model.model.lm_head": PrecisionMode.FP32}
    assert dict(session(fp32_modules=["transformer.h.0"]).plan.modules) == {
        "base_model.model.transformer.h.0": PrecisionMode.FP32
    }
    with pytest.raises(ConfigError, match=r"no module is called 'transformer\.h\.9'"):
        session(fp32_modules=["transformer.h.9"]).begin_run()


@for_each(
    ("options", "words"),
    [
        ({"metric": "perplexity"}, "metric must be one of logprob, loss"),
        ({"max_error": 0}, "max_error must be a positive finite number"),
        ({"number_format": "FP4"}, "it must be one of FP16, BF16, FP8 E4M3"),
        ({"number_format": "FP8 E4M3", "inference": True}, "use FP16 or BF16"),
    ],
)
def test_a_wrong_argument_is_an_error(options: dict[str, Any], words: str) -> None:
    """It says what is allowed."""
    with pytest.raises(ConfigError, match=words):
        choose_precision(Tower(), {"x": ROWS}, **options)


def test_what_cannot_be_audited_is_an_error() -> None:
    """Arguments that the model does not take, no logits, no loss, and NaN in FP32."""
    for model, batch, options, words in (
        (Tower(), {"y": ROWS}, {}, "cannot be run on y"),
        (nn.Linear(16, 4), {"input": ROWS}, {}, "returns no logits"),
        (nn.Linear(16, 4), {"input": ROWS}, {"metric": "loss"}, "returns no loss"),
        (Tower(), {"x": ROWS * math.nan}, {}, "not finite in FP32 either"),
    ):
        with pytest.raises(ConfigError, match=words):
            choose_precision(model, batch, **options)


def test_without_torchao_its_formats_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are left out, with the reason; asked for, they are an error that says what to install."""
    monkeypatch.setattr("hf_amp.choose.find_spec", lambda name: None)
    _, table = choose_precision(Tower(), {"x": ROWS})
    assert list(table.formats) == ["FP32", "TF32", "FP16", "BF16", "FP8 E4M3", "FP8 E5M2"]
    assert "pip install torchao" in table.missing
    for name in SCALED_FORMATS:
        with pytest.raises(ConfigError, match="pip install torchao"):
            choose_precision(Tower(), {"x": ROWS}, number_format=name)


def test_errors_grow_as_formats_narrow() -> None:
    """Fewer bits of mantissa, more error: TF32's operands have as many as FP16's, whose results are rounded too."""
    _, table = choose_precision(Tower(), {"x": ROWS})
    errors = [table.formats[name].rms for name in ("FP32", "TF32", "FP16", "BF16", "FP8 E4M3", "FP8 E5M2")]
    assert errors == sorted(errors)
    assert errors[0] == 0


# ---- a plan in a run ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_accelerator_state")
def test_a_trainer_follows_the_plan(tmp_path: Path) -> None:
    """As an object, a dict, or the path of its file, it is the same config, and the run has these modules in FP32 from its first step."""
    batch = {"input_ids": torch.tensor([row["input_ids"] for row in text_rows()[:4]])}
    plan, table = choose_precision(tiny_gpt2(), batch, number_format="BF16")
    assert dict(plan.modules) == {"lm_head": PrecisionMode.FP32}
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({**table.to_dict(), "plan": plan.to_plain()}), encoding="utf-8")
    configs = [
        MixedPrecisionConfig(plan=each) for each in (plan, plan.to_plain(), file, str(file), {"plan": plan.to_plain()})
    ]
    assert set(configs) == {MixedPrecisionConfig(precision_mode="BF16", fp32_modules=["lm_head"])}
    assert MixedPrecisionConfig.from_dict(configs[0].to_dict()) == configs[0]
    assert dataclasses.replace(configs[0], fp32_modules=["wte"], plan=plan).fp32_modules == ("wte", "lm_head")
    from transformers import Trainer

    callback = MixedPrecisionCallback(plan=str(file))
    options = arguments(tmp_path, fp16=False, bf16=True, max_steps=2)
    Trainer(tiny_gpt2(), options, train_dataset=text_rows(), callbacks=[callback]).train()
    assert callback.session.plan == plan


def test_a_model_in_a_run_is_measured_without_the_run_s_precision() -> None:
    """In a session in emulated FP16: the errors are those of the same model alone, and not of FP16 against itself."""
    model, batch = Tower().eval(), {"x": ROWS}
    _, alone = choose_precision(model, batch)
    with hf_amp.AmpSession.for_model(model, torch.optim.SGD(model.parameters(), lr=0.1)):
        assert choose_precision(model, batch)[1].formats == alone.formats


@for_each(
    ("batch", "words"),
    [
        ([ROWS], "by name, in a dict"),
        ({"input_ids": torch.tensor([[5]])}, "rows of two tokens and more"),
        ({"input_ids": torch.ones(1, 8, dtype=torch.long), "labels": torch.full((1, 8), -100)}, "other than -100"),
    ],
)
def test_a_batch_with_nothing_to_measure_is_an_error(batch: Any, words: str) -> None:
    """It says what to pass."""
    with pytest.raises(ConfigError, match=words):
        choose_precision(tiny_gpt2(), batch)


def test_a_compiled_model_is_measured_as_it_is() -> None:
    """Nothing is compiled for it, and the names are the model's own."""

    def refused(graph: Any, _inputs: Any) -> Any:
        pytest.fail("it is compiled")

    model, batch = Tower().eval(), {"x": ROWS}
    compiled: Any = torch.compile(model, backend=refused)
    assert choose_precision(compiled, batch)[1].modules == choose_precision(model, batch)[1].modules


def test_a_plan_that_contradicts_or_is_none_is_an_error(tmp_path: Path) -> None:
    """Of another precision than the config's; a file that is not there, or holds something else."""
    plain = {"default": "BF16", "modules": {"lm_head": "FP32"}}
    with pytest.raises(ConfigError, match=r"the plan is for FP16 autocast \(MIXED\); leave precision_mode out"):
        MixedPrecisionConfig(plan=PrecisionPlan(PrecisionMode.MIXED), precision_mode="FP16")
    with pytest.raises(ConfigError, match="the plan is for BF16; leave precision_mode out"):
        MixedPrecisionConfig(plan=plain, precision_mode="MIXED")
    assert MixedPrecisionConfig(plan=plain, precision_mode="bf16").precision_mode is PrecisionMode.BF16
    with pytest.raises(ConfigError, match=r"cannot be read .*it must be the path of a JSON file"):
        MixedPrecisionConfig(plan=tmp_path / "none.json")
    (tmp_path / "other.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(ConfigError, match="plan must be None or a plan"):
        MixedPrecisionConfig(plan=tmp_path / "other.json")


def test_scripted_functions_that_have_trained_are_audited() -> None:
    """DeBERTa's, which give tensors that seem to need gradients also where none are recorded: its errors are measured all the same."""
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 32,
    }
    config = DebertaV2Config(relative_attention=True, pos_att_type=["p2c", "c2p"], max_position_embeddings=16, **sizes)
    model = DebertaV2ForSequenceClassification(config)
    batch = {"input_ids": torch.arange(8)[None], "labels": torch.ones(1, dtype=torch.long)}
    for _ in range(4):
        model(**batch).loss.backward()
    _, table = choose_precision(model, batch, number_format="BF16", max_error=1.0)
    assert 0 < table.formats["BF16"].rms < 0.1
