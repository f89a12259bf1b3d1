"""A model that overflows in FP16 becomes one of the same function that does not: fifteen families, blown up by hand-written factors."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_amp.rescale import difference, divergence, rescale_for_fp16
from tests.rescale.families import FAMILIES, LAYERS, Family

BITS = 24
DEFAULT = {
    "LlamaForCausalLM": ("stream", "scores"),
    "GPT2LMHeadModel": ("stream", "values"),
    "T5ForConditionalGeneration": ("stream", "mlp"),
    "BertForMaskedLM": ("values", "scores"),
    "Gemma3ForCausalLM": ("stream", "mlp"),
}
RANDOM_BLOW_UPS = 1000


def outputs(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every floating-point tensor of a forward pass, in FP32."""
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        given = model(**{k: x.to(dtype) if x.is_floating_point() else x for k, x in batch.items()}, **no_cache(model))
    return {k: x.float() for k, x in given.items() if isinstance(x, Tensor) and x.is_floating_point()}


def no_cache(model: Any) -> dict[str, bool]:
    """Cached keys and values are none of the function's outputs."""
    return {"use_cache": False} if "use_cache" in model.forward.__code__.co_varnames else {}


def distance(exact: dict[str, Tensor], half: dict[str, Tensor]) -> float:
    """KL in nats; inf where something is not finite."""
    if not all(bool(x.isfinite().all()) for x in half.values()):
        return float("inf")
    nats = divergence(exact, half)
    return difference(exact, half) if nats is None else nats


def assert_made_safe(family: Family, exponents: dict[str, int], tmp_path: Path | None, overflows: bool = True) -> None:
    """Blown up, the model fails in FP16; rescaled, and through stock loading, it is as good as the one that never was."""
    batch, plain = family.inputs(), family.plain()
    exact = outputs(plain, batch)
    usual = distance(exact, outputs(copy.deepcopy(plain).half(), batch))
    blown = family.blown_up(exponents)
    before = outputs(blown, batch)
    assert difference(exact, before) <= 1e-5
    if overflows:
        assert not distance(before, outputs(copy.deepcopy(blown).half(), batch)) <= 2 * usual
    state = {k: x.clone() for k, x in blown.state_dict().items()}
    report = rescale_for_fp16(blown, batch)
    assert report.safe, report.sentence
    assert all(torch.equal(x, state[k]) for k, x in blown.state_dict().items())  # the given model is as it was
    assert difference(before, outputs(report.model, batch)) == report.relative_difference <= 1e-5
    assert report.bitwise is (report.relative_difference == 0)
    assert all(after >= 0 for _, after in report.headroom_bits.values())
    if tmp_path is None:
        half = copy.deepcopy(report.model).half()
    else:
        report.model.save_pretrained(tmp_path)
        half = type(blown).from_pretrained(tmp_path, dtype=torch.float16)
    assert distance(exact, outputs(half.eval(), batch)) <= 1.5 * usual + 1e-7


def ways(full_size: bool) -> list[tuple[Family, str]]:
    """Every family and way, or two each of five."""
    return [(f, way) for f in FAMILIES for way in f.symmetries if full_size or way in DEFAULT.get(f.name, ())]


def test_every_way_is_made_safe(full_size: bool, tmp_path: Path) -> None:
    """Finite in pure FP16 through stock `from_pretrained`, FP32 outputs the same, no module in FP32."""
    for family, way in ways(full_size):
        folder = tmp_path / f"{family.name}_{way}"
        try:
            assert_made_safe(family, {way: BITS}, folder if full_size or way == "stream" else None)
        except AssertionError as error:
            raise AssertionError(f"{family.name}, {way}") from error


def test_there_are_fifteen_families_and_three_ways_each() -> None:
    """What the other tests go through is as much as is claimed."""
    assert len({f.name for f in FAMILIES}) == 15
    assert all(len(f.symmetries) >= 3 for f in FAMILIES)


def random_blow_up(draw: random.Random) -> tuple[Family, dict[str, int]]:
    """Several ways at once, each in all layers or in one, by any power of two up to 2^22, also downward."""
    family = draw.choice(FAMILIES)
    chosen: dict[str, int] = {}
    for way, symmetry in family.symmetries.items():
        if draw.random() < 0.6:
            layered = all("{}" in f.names for f in symmetry.factors) and not symmetry.squares
            key = f"{way} {draw.randrange(LAYERS)}" if layered and draw.random() < 0.5 else way
            downward = not any(f.offset for f in symmetry.factors) and not symmetry.squares
            chosen[key] = draw.randrange(-22 if downward else 1, 23)
    return family, chosen


def test_random_blow_ups_change_no_function_in_silence(full_size: bool) -> None:
    """Safe means the same function and finite in FP16; what is refused says why."""
    draw, safe, count = random.Random(0), 0, RANDOM_BLOW_UPS if full_size else 12
    for index in range(count):
        family, exponents = random_blow_up(draw)
        blown, batch, other = family.blown_up(exponents), family.inputs(), family.inputs(index + 1)
        report = rescale_for_fp16(blown, batch)
        at = f"{index}: {family.name} {exponents}: {report.sentence}"
        if not report.safe:
            assert report.refused, at
            continue
        safe += 1
        for each in (batch, other):
            exact = outputs(blown, each)
            assert difference(exact, outputs(report.model, each)) <= 1e-5, at
        assert distance(outputs(blown, batch), outputs(report.model.half(), batch)) < 1e-2, at
    print(f"{safe} of {count} random blow-ups were made safe")
    assert safe >= 0.95 * count
