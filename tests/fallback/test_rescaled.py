"""The rescaled models are what they are said to be: ordinary functions that plain FP16 cannot train."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.fallback.range_reference import fp16_flop_share, matmul_amax, modules_out_of_range
from tests.fallback.rescaled import ZOO, RescaledModel

FP16_LARGEST = torch.finfo(torch.float16).max
EXPECTED = {
    "GPT-2": {f"transformer.h.{i}.{part}.c_proj" for i in range(2) for part in ("attn", "mlp")},
    "T5": {f"encoder.block.1.layer.1.DenseReluDense.{part}" for part in ("wi", "wo")},
    "Llama": {f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn.o_proj", "mlp.down_proj")},
    "BERT": {"cls.predictions.transform.dense"},
    "ViT": {f"vit.layers.{i}.{part}" for i in range(2) for part in ("attention.o_proj", "mlp.fc2")}
    | {"vit.embeddings.patch_embeddings.projection"},
    "Whisper": {f"model.encoder.layers.0.self_attn{part}" for part in ("", ".v_proj", ".out_proj")},
}
every_model = pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)


def logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """In FP64."""
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
    with torch.no_grad():
        return model.double()(**inputs).logits


def losses(model: PreTrainedModel, optimizer: torch.optim.Optimizer, batches: list[dict[str, Tensor]]) -> list[float]:
    """Of every FP32 step."""
    values = []
    for batch in batches:
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values


@every_model
def test_the_function_is_that_of_the_plain_model(entry: RescaledModel) -> None:
    """In FP64 the logits differ by at most 1e-9 of the largest, although parameters differ."""
    model, batches, _ = entry.build(0)
    plain, batch = entry.plain(0), next(batches)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    expected = logits(plain, batch)
    assert (logits(model, batch) - expected).abs().max() <= 1e-9 * expected.abs().max()


@every_model
def test_the_named_modules_leave_the_range_and_stay_out_of_it(entry: RescaledModel, full_size: bool) -> None:
    """They do so by far (tenfold) before and after 80 steps, or 200; all other modules stay far inside, and do most of the work."""
    model, batches, make_optimizer = entry.build(0)
    expected = EXPECTED[entry.name]
    batch = next(batches)
    history = losses(model, make_optimizer(model), [next(batches) for _ in range(200 if full_size else 80)])
    fresh, _, _ = entry.build(0)
    for state in (fresh, model):
        amax = matmul_amax(state, batch)
        assert modules_out_of_range(state, batch) == expected
        assert min(amax[name] for name in expected) > 10 * FP16_LARGEST
        assert max(value for name, value in amax.items() if name not in expected) < FP16_LARGEST / 10
        assert fp16_flop_share(state, batch, expected) > 0.6
    assert sum(history[-20:]) / 20 < 0.8 * history[0]


@every_model
def test_it_learns_what_the_plain_model_learns(entry: RescaledModel) -> None:
    """Over 20 FP32 steps every loss is that of the plain model under plain AdamW, whose learning rate is logged."""
    model, batches, make_optimizer = entry.build(0)
    assert make_optimizer(model).param_groups[0]["lr"] == entry.learning_rate
    plain = entry.plain(0)
    data = [next(batches) for _ in range(20)]
    adamw = torch.optim.AdamW(plain.parameters(), entry.learning_rate, weight_decay=0.0, fused=True)
    expected = losses(plain, adamw, data)
    assert losses(model, make_optimizer(model), data) == pytest.approx(expected, rel=1e-4)


class _Product(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ x.mT


class _Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = _Product(), nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(1e9 * self.first(x)))


@pytest.mark.parametrize(("size", "expected"), [(100.0, set()), (200.0, {"first"})])
def test_the_reference_names_products_of_modules_without_parameters(size: float, expected: set[str]) -> None:
    """`x @ x.mT` leaves the range at 4·200² but not at 4·100²; a norm that reads large values is none of it."""
    assert modules_out_of_range(_Products(), {"x": torch.full((4, 4), size)}) == expected


def test_flops_are_counted_once() -> None:
    """A share by hand: the second of two equal products is half, with its parent or without."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)))
    batch = {"input": torch.randn(2, 8)}
    assert fp16_flop_share(model, batch, {"1.0"}) == 0.5
    assert fp16_flop_share(model, batch, {"1", "1.0"}) == 0.5
    assert fp16_flop_share(model, batch, set()) == 1
