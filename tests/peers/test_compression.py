"""What makes models smaller beside hf_amp: torchao's quantisation-aware training, LoRA on quantised bases, pruning."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, set_seed

from hf_amp import AmpSession, Cause, EventKind, MixedPrecisionCallback, PrecisionMode
from hf_amp.choose import ModuleError, errors_by_module
from hf_amp.statistics import are_finite
from tests.each import for_each
from tests.integrations.trainers import OverflowAt, arguments, logged, text_rows

torchao = pytest.importorskip("torchao.quantization", reason="needs torchao, which the extra hf_amp[peers] brings")
peft = pytest.importorskip("peft", reason="needs peft, which the extra hf_amp[examples] brings")
from torchao.quantization.granularity import PerGroup  # noqa: E402
from torchao.quantization.qat import QATConfig  # noqa: E402
from torchao.sparsity import WandaSparsifier  # noqa: E402

pytestmark = pytest.mark.usefixtures("fresh_accelerator_state")
EXAMPLE = Path(__file__).parents[2] / "examples" / "trainer_qat.py"
TWO_BITS = torchao.IntxWeightOnlyConfig(torch.int2, PerGroup(32))


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    """The functions of `examples/trainer_qat.py`."""
    return runpy.run_path(str(EXAMPLE))


@pytest.mark.parametrize(("name", "steps"), [("network", 40), ("vit", 100), ("llama", 40)])
def test_qat_ends_below_post_training_quantisation(
    tmp_path: Path, example: dict[str, Any], name: str, steps: int
) -> None:
    """In FP16 with the callback, from one seed, after as many steps, converted to two bits, on rows that it has not seen."""
    losses = example["compare"](name, 2, steps, tmp_path)
    assert losses["QAT"] < losses["quantised after"]


def test_the_module_whose_quantisation_costs_the_loss_is_named(tmp_path: Path, example: dict[str, Any]) -> None:
    """One whose groups each hold an outlier, which takes the scale of the others; without it none stands out."""
    data = example["images"]()
    batch = example["default_data_collator"](data[-example["HELD_OUT"] :])
    model = example["trained"](example["Network"](), data, 60, 1e-2, tmp_path)
    before = [p.clone() for p in model.parameters()]
    batch = {key: x[:32] for key, x in batch.items()}

    def costs() -> list[ModuleError]:
        return errors_by_module(model, batch, lambda twin: torchao.quantize_(twin, QATConfig(TWO_BITS, step="prepare")))

    dearest, second, _ = costs()
    assert dearest.rms < 2 * second.rms
    with torch.no_grad():
        model.first.weight[:, ::32] = 3.0  # of pixels that are always 0
    dearest, second, _ = costs()
    assert dearest.module == "first"
    assert dearest.rms > 2 * second.rms
    assert dearest.widened < second.widened
    assert dearest.products == pytest.approx(64 * 64 / (2 * 64 * 64 + 64 * 10))
    assert all(torch.equal(p, q) for p, q in list(zip(model.parameters(), before, strict=True))[1:])


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    set_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).to(dtype)


def take_steps(session: AmpSession, model: nn.Module, optimizer: Any, batches: list[torch.Tensor]) -> None:
    """One step for each batch, in a loop of one's own."""
    for x in batches:
        with session.autocast():
            loss = (model(x).float() / x.abs().max()).square().mean()
        session.scaler.scale(loss).backward()
        session.scaler.step(optimizer)
        session.scaler.update()
        optimizer.zero_grad()


def batches(bad: int | None = None, size: float = 1.0) -> list[torch.Tensor]:
    """Six; that of number `bad` holds a NaN."""
    given = [torch.randn(4, 64, generator=torch.Generator().manual_seed(i)) * size for i in range(6)]
    if bad is not None:
        given[bad][0, 0] = torch.nan
    return given


def test_skips_and_fallback_of_fake_quantised_modules() -> None:
    """A bad batch moves nothing and is named; a module that leaves FP16's range runs in FP32, and the run goes on."""
    model = network()
    torchao.quantize_(model, QATConfig(TWO_BITS, step="prepare"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    session = AmpSession.for_model(model, optimizer, init_scale=16.0)
    take_steps(session, model, optimizer, batches(bad=2))
    assert session.monitor.skipped_by_cause == {"INPUT": 1}
    take_steps(session, model, optimizer, batches(size=3e5))
    changed = next(e for e in session.events if e.kind is EventKind.PRECISION_CHANGED)
    assert (changed.cause, changed.after) == (Cause.ACTIVATION, "FP32")
    assert "0" in changed.modules
    assert session.monitor.applied_steps > 5
    session.detach()
    torchao.quantize_(model, QATConfig(TWO_BITS, step="convert"))
    assert isinstance(model[0].weight, torchao.IntxUnpackedToInt8Tensor)
    assert bool(model(torch.ones(2, 64)).isfinite().all())


def is_frozen_linear(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "lm_head" not in name


def int8_base(model: nn.Module) -> None:
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), filter_fn=is_frozen_linear)


def nf4_base(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if is_frozen_linear(module, name):
            module.weight = nn.Parameter(torchao.to_nf4(module.weight.detach()), requires_grad=False)


def bitsandbytes_base(model: nn.Module) -> None:
    library = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, which the extra hf_amp[peers] brings")
    for name, module in list(model.named_modules()):
        if is_frozen_linear(module, name):
            four = library.nn.Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4")
            four.weight = library.nn.Params4bit(module.weight.detach().clone(), requires_grad=False, quant_type="nf4")
            model.set_submodule(name, four)
    model.to("cpu")


@pytest.mark.parametrize("quantise", [int8_base, nf4_base, bitsandbytes_base])
@for_each("flags", [{"fp16": True}, {"fp16": False, "bf16": True}])
def test_lora_on_a_quantised_base(
    tmp_path: Path, quantise: Callable[[nn.Module], None], flags: dict[str, bool]
) -> None:
    """Through PEFT and a Trainer: it learns, the overflow is skipped, and the base is what it was."""
    set_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=256, max_position_embeddings=32))
    quantise(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=4))
    frozen = {name: p for name, p in adapted.named_parameters() if not p.requires_grad}
    tokens = torch.tensor([text_rows()[0]["input_ids"]])
    before = base_output(adapted, tokens)
    callback = MixedPrecisionCallback(init_scale=1024.0)
    options = {"max_steps": 8, "learning_rate": 1e-2, **flags}
    trainer = Trainer(
        adapted, arguments(tmp_path, **options), train_dataset=text_rows(), callbacks=[callback, OverflowAt(3)]
    )
    trainer.train()
    figures = callback.session.metrics()
    assert (figures["applied_steps"], figures["skipped_steps"]) == (7, 1)
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0]
    assert frozen.keys() == {name for name, p in adapted.named_parameters() if not p.requires_grad}
    callback.session.detach()
    trainer.accelerator.unwrap_model(adapted, keep_fp32_wrapper=False)  # accelerate's own autocast
    assert torch.equal(base_output(adapted, tokens), before)


@torch.no_grad()
def base_output(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The logits without the adapters, in FP32."""
    with model.disable_adapter():
        return model.train()(input_ids=tokens).logits.clone()  # in evaluation bitsandbytes repacks weights, for good


def test_quantised_weights_are_finite_where_their_scales_are() -> None:
    """They have no `isfinite` of their own."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[1].weight[3, 3] = torch.inf
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    assert are_finite([model[0].weight, model[1].weight, model[0].bias]) == [True, False, True]


def pruned(model: nn.Module) -> Callable[[], dict[str, torch.Tensor]]:
    """Half of each linear layer's weights by `torch.nn.utils.prune`; gives what is applied now."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for layer in layers.values():
        prune.l1_unstructured(layer, "weight", 0.5)
    return lambda: {name: layer.weight_orig * layer.weight_mask for name, layer in layers.items()}


def sparse(model: nn.Module) -> Callable[[], dict[str, torch.Tensor]]:
    """The same by torchao's Wanda, after it has seen activations."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    sparsifier = WandaSparsifier(sparsity_level=0.5)
    sparsifier.prepare(model, [{"tensor_fqn": f"{name}.weight"} for name in layers])
    model(torch.ones(4, 64, dtype=next(model.parameters()).dtype))
    sparsifier.step()
    return lambda: {name: layer.weight for name, layer in layers.items()}


KINDS = [
    ({}, torch.float32),
    ({"half_parameters": "master_weights"}, torch.float16),
    ({"half_parameters": "stochastic_rounding"}, torch.float16),
    ({"half_parameters": "kahan"}, torch.float16),
    ({"half_parameters": "master_weights", "precision_mode": "BF16"}, torch.bfloat16),
]


@pytest.mark.parametrize("method", [pruned, sparse])
@for_each(("options", "dtype"), KINDS)
def test_masks_survive_skips_master_weights_and_fallback(
    method: Callable[[nn.Module], Callable[[], dict[str, torch.Tensor]]], options: dict[str, Any], dtype: torch.dtype
) -> None:
    """What was pruned is zero after a bad batch, and after modules went to FP32; what was not has moved."""
    model = network(dtype)
    weights = method(model)
    zeros = {name: (w == 0).clone() for name, w in weights().items()}
    former = {name: w.detach().clone() for name, w in weights().items()}
    assert all(0.4 < float(z.float().mean()) < 0.6 for z in zeros.values())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    session = AmpSession.for_model(model, optimizer, init_scale=16.0, **options)
    emulated = session.requested_mode is PrecisionMode.MIXED
    take_steps(session, model, optimizer, [x.to(dtype) for x in batches(bad=2)])
    assert session.monitor.skipped_by_cause == {"INPUT": 1}
    take_steps(session, model, optimizer, batches(size=3e5 if emulated else 1.0))
    if emulated:
        assert session.monitor.record.fallback_count
    assert session.monitor.applied_steps > 5
    session.detach()
    after = weights()
    assert all(torch.equal(after[name] == 0, zeros[name]) for name in zeros)
    assert all(not torch.equal(after[name], former[name]) for name in zeros)
    assert all(bool(w.isfinite().all()) for w in after.values())
