"""FP8 through accelerate and torchao, which emulates it on a CPU: hf_amp observes and checks, modules do not fall back."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import AORecipeKwargs
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

import hf_amp
from hf_amp import AttachError, ConfigError, MixedPrecisionCallback, MixedPrecisionConfig
from hf_amp.choose import RoundedOperands, torchao_formats
from tests.each import for_each, forget_accelerators
from tests.reference import OverflowInBackward, assert_bitwise_equal, snapshot

float8 = pytest.importorskip("torchao.float8", reason="needs torchao, which the extra hf_amp[peers] brings")

pytestmark = pytest.mark.usefixtures("fresh_accelerator_state")
SAYS = "FP8 is run by torchao: hf_amp observes and checks, modules do not fall back"


class Model(nn.Module):
    """Three layers, of which accelerate converts all but the first and the last to FP8."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        output = self.last(self.middle(self.first(x).relu()).relu())
        return output if labels is None else {"loss": (output.float() - labels).square().mean()}


def fp8_accelerator() -> Accelerator:
    """An Accelerator in FP8 on the CPU."""
    recipe = AORecipeKwargs(config=float8.Float8LinearConfig(emulate=True))
    return Accelerator(mixed_precision="fp8", kwargs_handlers=[recipe], cpu=True)


def train(accelerator: Accelerator, model: Any, optimizer: Any, faults: dict[int, str]) -> list[bool]:
    """Five steps, with "input" or "gradient" not finite in those of `faults`; which of them were skipped."""
    skipped = []
    for step in range(1, 6):
        loss = model(torch.linspace(-1, 1, 256).reshape(16, 16) * (math.nan if faults.get(step) == "input" else 1))
        loss = loss.square().mean()
        accelerator.backward(OverflowInBackward.apply(loss) if faults.get(step) == "gradient" else loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        skipped.append(accelerator.optimizer_step_was_skipped)
    return skipped


def prepared(accelerator: Accelerator) -> tuple[Any, Any]:
    """The model, converted, and its AdamW."""
    model = Model()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True))
    assert isinstance(model.middle, float8.float8_linear.Float8Linear)
    return model, optimizer


@pytest.mark.parametrize("attach_first", [True, False])
def test_bad_steps_are_skipped_and_told(attach_first: bool) -> None:
    """NaN in the batch, and a gradient that is not finite: skipped at scale 1, with a cause; the rest are as without."""
    accelerator = fp8_accelerator()
    session = hf_amp.attach(accelerator) if attach_first else None
    model, optimizer = prepared(accelerator)
    session = session or hf_amp.attach(accelerator)
    assert train(accelerator, model, optimizer, {2: "input", 4: "gradient"}) == [False, True, False, True, False]
    skips = [event for event in session.events if event.kind == "step_skipped"]
    assert [(e.step, e.cause, e.before, e.after) for e in skips] == [(2, "INPUT", 1, 1), (4, "UNKNOWN", 1, 1)]
    assert "the first gradient that is not finite is that of last" in skips[1].message.lower()
    assert all(p.isfinite().all() for p in model.parameters())
    metrics = session.metrics()
    assert (metrics["scale"], metrics["applied_steps"], metrics["skipped_steps"]) == (1, 3, 2)
    assert "fp16_seconds" not in metrics


def test_a_run_without_faults_is_the_same_to_the_last_bit() -> None:
    """Parameters and optimizer state with hf_amp, monitoring modules, and without."""
    results = []
    for attached in (True, False):
        accelerator = fp8_accelerator()
        if attached:
            hf_amp.attach(accelerator, MixedPrecisionConfig(monitor_modules=True, monitoring_interval=1))
        model, optimizer = prepared(accelerator)
        train(accelerator, model, optimizer, {})
        results.append(snapshot(model, optimizer))
    assert_bitwise_equal(*results)


def test_no_forward_pass_is_repeated() -> None:
    """After a skip: it would run, and with delayed scaling move, the other library's scales. Without monitoring none is at all."""
    for monitored in (False, True):
        accelerator, calls = fp8_accelerator(), list[bool]()
        hf_amp.attach(accelerator, enable_monitoring=monitored)
        model, optimizer = prepared(accelerator)
        counting = register_module_forward_pre_hook(lambda module, _, to=calls: to.append(isinstance(module, Model)))
        faults = {4: "input", 5: "gradient"} if monitored else {1: "gradient", 2: "input", 3: "gradient"}
        train(accelerator, model, optimizer, faults)
        counting.remove()
        assert sum(calls) == 5 + 2 * monitored  # what names layers, after the second step
        forget_accelerators()


def test_nothing_falls_back() -> None:
    """Not even where every step is skipped without a cause, which takes a BF16 run to FP32."""
    accelerator = fp8_accelerator()
    session = hf_amp.attach(accelerator)
    model, optimizer = prepared(accelerator)
    train(accelerator, model, optimizer, dict.fromkeys(range(1, 6), "gradient"))
    assert session.metrics()["skipped_steps"] == 5
    assert session.metrics()["precision_changes"] == 0
    assert session.plan.default is session.requested_mode


def test_attach_says_who_runs_what() -> None:
    """One event, before the first step."""
    session = hf_amp.attach(fp8_accelerator())
    (event,) = session.events
    assert SAYS in event.message
    assert session.describe().startswith("FP8 by torchao with BF16 around it on ")


@for_each(
    ("option", "value"),
    [
        ("precision_mode", "DYNAMIC"),
        ("precision_mode", "MIXED"),
        ("half_parameters", "master_weights"),
        ("precision_schedule", {5: "FP32"}),
    ],
)
def test_an_option_that_would_change_precision_is_refused(option: str, value: str) -> None:
    """The error names the option and who owns the precision; nothing is changed by the attempt."""
    accelerator = fp8_accelerator()
    before = dict(vars(accelerator))
    with pytest.raises(ConfigError, match=f"{option}=.*FP8 is run by torchao.*leave {option} out"):
        hf_amp.attach(accelerator, MixedPrecisionConfig(**{option: value}))
    assert vars(accelerator) == before


class Wide(nn.Module):
    """A stem, three layers that accelerate converts to FP8, of which the second has an outlier, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(16, 32)
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.head = nn.Linear(32, 16)
        with torch.no_grad():
            self.blocks[1].weight[0, 0] = 1e6  # one scale for all: the others are lost

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x).tanh()
        return {"logits": self.head(x)}


ROWS = {"x": torch.randn(64, 16, generator=torch.Generator().manual_seed(1))}


def converted(model: nn.Module) -> set[str]:
    return {name for name, m in model.named_modules() if isinstance(m, float8.float8_linear.Float8Linear)}


@for_each(
    ("chosen", "in_fp8"),
    [
        ([], {"blocks.0", "blocks.1", "blocks.2"}),
        (["blocks.1"], {"blocks.0", "blocks.2"}),
        (["blocks"], set()),
        (["Linear"], set()),
    ],
)
def test_fp32_modules_are_left_out_of_the_conversion(chosen: list[str], in_fp8: set[str]) -> None:
    """By name, container and class, besides the first and the last; they compute in FP32, and detach gives the recipe back."""
    accelerator = fp8_accelerator()
    before = dict(vars(accelerator.ao_recipe_handler))
    session = hf_amp.attach(accelerator, fp32_modules=chosen)
    model = accelerator.prepare(Wide())
    assert converted(model) == in_fp8
    assert vars(accelerator.ao_recipe_handler) == before
    if chosen == ["blocks.1"]:
        seen: list[Any] = []
        model.blocks[1].register_forward_hook(lambda module, given, output: seen.append((given[0], output)))
        model(**ROWS)
        ((given, output),) = seen
        exact = nn.functional.linear(given.double(), model.blocks[1].weight.double(), model.blocks[1].bias.double())
        assert (output.double() - exact).abs().max() < 1e-6 * exact.abs().max()
    session.detach()
    assert "prepare" not in vars(accelerator)


def test_a_recipes_own_filter_goes_on() -> None:
    """What it leaves out stays left out, and what accelerate leaves out by default is then up to it."""
    wants = AORecipeKwargs(
        config=float8.Float8LinearConfig(emulate=True), module_filter_func=lambda m, n: n != "blocks.0"
    )
    accelerator = Accelerator(mixed_precision="fp8", kwargs_handlers=[wants], cpu=True)
    hf_amp.attach(accelerator, fp32_modules=["blocks.1"])
    assert converted(accelerator.prepare(Wide())) == {"stem", "blocks.2", "head"}


def test_the_precision_around_it_may_be_said() -> None:
    """As plans do; without a change of what runs."""
    session = hf_amp.attach(fp8_accelerator(), precision_mode="BF16")
    assert session.plan.default is hf_amp.PrecisionMode.BF16


def test_a_model_that_is_converted_already_is_an_error() -> None:
    """It says what to do."""
    accelerator = fp8_accelerator()
    accelerator.prepare(Wide())
    with pytest.raises(AttachError, match=r"converted to FP8 already; call hf_amp.attach before prepare"):
        hf_amp.attach(accelerator, fp32_modules=["blocks.1"])


def test_the_layer_that_does_the_damage_is_named_and_left_out() -> None:
    """The audit's error for scaled FP8 is that of the real conversion within a tenth; its plan for a fifth of it names the planted layer
    first, and the real run with that plan is as exact as predicted."""
    exact = Wide()(**ROWS)["logits"].log_softmax(-1)

    def error_of(fp32_modules: Any, converts: Any = None) -> float:
        forget_accelerators()
        recipe = AORecipeKwargs(config=float8.Float8LinearConfig(emulate=True), module_filter_func=converts)
        accelerator = Accelerator(mixed_precision="fp8", kwargs_handlers=[recipe], cpu=True)
        hf_amp.attach(accelerator, fp32_modules=fp32_modules)
        found = accelerator.prepare(Wide())(**ROWS)["logits"].float().log_softmax(-1)
        return (found - exact).square().mean().sqrt().item()

    plan, table = hf_amp.choose_precision(Wide(), ROWS, number_format="scaled FP8", max_error=None)
    assert table.modules[0].module == "blocks.1"
    everything = error_of([], converts=lambda module, name: True)
    assert table.formats["scaled FP8"].rms == pytest.approx(everything, rel=0.1)
    assert "blocks.1" in plan.modules
    left_out = error_of(list(plan.modules), converts=lambda module, name: True)
    assert left_out == pytest.approx(table.chosen.rms, rel=0.1)
    assert left_out < everything / 5
    assert MixedPrecisionConfig(plan=plan).fp32_modules == tuple(plan.modules)
    assert table.settings["accelerate.Accelerator"] == {"mixed_precision": "fp8"}


@for_each("name", ["scaled FP8", "MXFP8"])
def test_a_scaled_format_is_torchaos_own(name: str) -> None:
    """A layer that torchao has converted, with its emulated product, gives the same bits."""
    from torchao.prototype.mx_formats.inference_workflow import MXDynamicActivationMXWeightConfig
    from torchao.quantization import quantize_
    from torchao.quantization.quantize_.common import KernelPreference

    layer, x = nn.Sequential(nn.Linear(64, 96, bias=False)).bfloat16(), torch.randn(10, 64).bfloat16()
    converted = copy.deepcopy(layer)
    if name == "MXFP8":
        quantize_(converted, MXDynamicActivationMXWeightConfig(kernel_preference=KernelPreference.EMULATED))
    else:
        float8.convert_to_float8_training(converted, config=float8.Float8LinearConfig(emulate=True))
    (audited,) = [each for each in torchao_formats() if each.name == name]
    with torch.no_grad():
        expected = converted(x)
        with hf_amp.emulate(torch.bfloat16, autocast=False), RoundedOperands(audited.rounded):
            found = layer(x)
        assert not torch.equal(layer(x), expected)
    assert torch.equal(found, expected)


def test_nvfp4_is_its_definition() -> None:
    """Blocks of 16 values of E2M1, times a scale of E4M3, times one for the tensor; a tensor of zeros stays one."""
    (nvfp4,) = [each for each in torchao_formats() if each.name == "NVFP4"]
    x = torch.randn(8, 64) * torch.logspace(-0.5, 0.5, 8).unsqueeze(1)
    whole = x.abs().max() / (448 * 6)
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    blocks = x.reshape(-1, 16)
    scales = (blocks.abs().amax(1, keepdim=True) / 6 / whole).to(torch.float8_e4m3fn).float() * whole
    nearest = grid[((blocks / scales).abs().unsqueeze(-1) - grid).abs().argmin(-1)]
    expected = (nearest * blocks.sign() * scales).reshape(x.shape)
    torch.testing.assert_close(nvfp4.rounded(x), expected, rtol=1e-5, atol=0)
    assert torch.equal(nvfp4.rounded(torch.zeros(2, 16)), torch.zeros(2, 16))


def test_detach_restores_what_was_there() -> None:
    """Accelerator, optimizer and every module, converted ones too, as before attach."""
    accelerator = fp8_accelerator()
    model, optimizer = prepared(accelerator)
    owners = [accelerator, optimizer, *model.modules()]

    def build(owner: Any) -> dict[str, Any]:
        return {
            name: dict(value) if isinstance(value, dict) and name.endswith("hooks") else value
            for name, value in vars(owner).items()
            if callable(value) or name.endswith("hooks") or isinstance(value, bool)
        }

    before = [build(owner) for owner in owners]
    with hf_amp.attach(accelerator):
        assert [build(owner) for owner in owners] != before
        train(accelerator, model, optimizer, {2: "input"})
    assert [build(owner) for owner in owners] == before


def test_a_trainer_leaves_modules_out_of_fp8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The callback is there before the Trainer prepares its model."""
    from transformers import Trainer, TrainingArguments

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    rows = [{"x": torch.full((16,), 0.1 * i), "labels": torch.zeros(16)} for i in range(16)]
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, max_steps=1, report_to="none", save_strategy="no")
    callback = MixedPrecisionCallback(fp32_modules=["middle"])
    trainer = Trainer(Model(), arguments, train_dataset=rows, callbacks=[callback])
    trainer.train()
    assert type(trainer.model.middle) is nn.Linear
    assert dict(callback.session.plan.modules) == {"middle": hf_amp.PrecisionMode.FP32}


def test_a_trainer_that_accelerate_runs_in_fp8_is_guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TrainingArguments has no word for FP8, the environment of accelerate has: the batch with NaN costs one step."""
    from transformers import Trainer, TrainingArguments

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    rows = [{"x": torch.full((16,), 0.1 * i), "labels": torch.zeros(16)} for i in range(64)]
    rows[20]["x"] = torch.full((16,), math.nan)
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, max_steps=4, per_device_train_batch_size=16, logging_steps=1,
        report_to="none", save_strategy="no", train_sampling_strategy="sequential",
    )  # fmt: skip
    callback = MixedPrecisionCallback()
    trainer = Trainer(Model(), arguments, train_dataset=rows, callbacks=[callback])
    trainer.train()
    assert isinstance(trainer.model.middle, float8.float8_linear.Float8Linear)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["amp/skipped_steps"] for entry in logged] == [0, 1, 1, 1]
    assert SAYS in callback.session.events[0].message
    assert [e.cause for e in callback.session.events if e.kind == "step_skipped"] == ["INPUT"]


def test_the_layers_that_do_damage_are_named_in_the_middle_of_a_run() -> None:
    """A layer with outliers, of a model that torchao has converted and that has taken steps: as of the same model in FP32."""

    class Two(Model):
        def __init__(self) -> None:
            super().__init__()
            last, self.other = self._modules.pop("last"), nn.Linear(32, 32)
            self.last = last  # the last one, which accelerate leaves out

        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            hidden = self.other(self.middle(self.first(x).relu()).relu()).relu()
            return {"logits": self.last(hidden)}

    accelerator = fp8_accelerator()
    session = hf_amp.attach(accelerator)
    plain, x = Two(), torch.linspace(-1, 1, 256).reshape(16, 16)
    with torch.no_grad():
        plain.other.weight[0, 0] = 50.0
    model, optimizer = accelerator.prepare(plain, torch.optim.AdamW(plain.parameters(), lr=1e-3))
    accelerator.backward(model(x)["logits"].square().mean())
    optimizer.step()
    assert isinstance(model.other, float8.float8_linear.Float8Linear)
    found = hf_amp.choose_precision(model, {"x": x}, number_format="scaled fp8")
    twin = Two()
    twin.load_state_dict(model.state_dict())
    assert found[1].modules == hf_amp.choose_precision(twin, {"x": x}, number_format="scaled FP8")[1].modules
    converted = [each for each in found[1].modules if each.module in ("middle", "other")]
    assert max(converted, key=lambda each: each.rms).module == "other"
    assert "choose_precision" in session.events[0].message
    assert isinstance(model.other, float8.float8_linear.Float8Linear)


@pytest.mark.parametrize("gathers", [True, False])
def test_parameters_that_the_default_recipe_replaces_are_said_not_to_train(gathers: bool) -> None:
    """accelerate's recipe puts others in their place for FSDP2's sake, which an optimizer that was made before does not move."""
    recipe = AORecipeKwargs(enable_fsdp_float8_all_gather=gathers)
    accelerator = Accelerator(mixed_precision="fp8", kwargs_handlers=[recipe], cpu=True)
    session, model = hf_amp.attach(accelerator), Model()
    before = model.middle.weight.detach().clone()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    accelerator.backward(sum((p * 1.0).sum() for p in model.parameters()))  # CPUs have no FP8 products
    optimizer.step()
    said = [event.message for event in session.events if "have taken their place and do not train" in event.message]
    assert (torch.equal(model.middle.weight.detach(), before), len(said)) == (gathers, gathers)
    assert all("1 parameter (middle.weight)" in each and "enable_fsdp_float8_all_gather=False" in each for each in said)
