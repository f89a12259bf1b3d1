"""One blow-up of one model, and what became of it: what the tests assert and the benchmark counts."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_amp.rescale import difference, divergence, rescale_for_fp16
from tests.rescale import architectures
from tests.rescale.families import FAMILIES, LAYERS, Family

BITS = 24
JUDGED_ROWS, TWINS, TIE = 16, 100, 0.02
"""Rows of the batch that divergences are over, which no rescaling has seen; twins, and how near to a tie they round at random."""
FURTHER = [
    "OPTForCausalLM",
    "GPTNeoXForCausalLM",
    "OlmoForCausalLM",
    "Olmo2ForCausalLM",
    "Olmo3ForCausalLM",
    "OlmoeForCausalLM",
    "Phi3ForCausalLM",
    "PhimoeForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "StableLmForCausalLM",
    "Starcoder2ForCausalLM",
    "SmolLM3ForCausalLM",
    "PersimmonForCausalLM",
    "NemotronForCausalLM",
    "MptForCausalLM",
    "GPTJForCausalLM",
    "HeliumForCausalLM",
    "OpenAIGPTLMHeadModel",
    "XGLMForCausalLM",
    "GPTBigCodeForCausalLM",
    "SeedOssForCausalLM",
    "BloomForCausalLM",
    "CohereForCausalLM",
    "Exaone4ForCausalLM",
    "DiffLlamaForCausalLM",
    "FlexOlmoForCausalLM",
    "ArceeForCausalLM",
    "ApertusForCausalLM",
    "BioGptForCausalLM",
    "Dots1ForCausalLM",
    "GemmaForCausalLM",
    "MambaForCausalLM",
    "RobertaForMaskedLM",
    "AlbertForMaskedLM",
    "DistilBertForMaskedLM",
    "ElectraForMaskedLM",
    "DebertaV2ForMaskedLM",
    "MPNetForMaskedLM",
    "XLMRobertaForMaskedLM",
    "EsmForMaskedLM",
    "RoFormerForMaskedLM",
    "ModernBertForMaskedLM",
    "MegatronBertForMaskedLM",
    "DeiTForImageClassification",
    "Dinov2ForImageClassification",
    "BeitForImageClassification",
    "ViTMSNForImageClassification",
    "PegasusForConditionalGeneration",
    "MBartForConditionalGeneration",
    "MarianMTModel",
    "BlenderbotForConditionalGeneration",
    "UMT5ForConditionalGeneration",
    "M2M100ForConditionalGeneration",
    "SwitchTransformersForConditionalGeneration",
]
"""Architectures beside the fifteen families: those of transformers that come small, and in which three pairs are found."""


@dataclass(frozen=True)
class Trial:
    """What became of a blown-up model.

    Attributes:
        name, way: the architecture, and what was multiplied.
        failed_before: whether it was of no use in FP16: not finite, or twice as far from FP32 as the model never blown up.
        safe, bitwise: of the report.
        apart: relative difference of FP32 outputs to the blown-up model's, also on inputs that were not looked at.
        times_usual: divergence from FP32 in FP16, loaded as half, as a multiple of that of the model never blown up; inf where
            something is not finite, NaN where it is not safe.
        times_chance: where that is above 1.5, the same as a multiple of the largest one of its twins, which `of_twins` rounds.
        sentence: of the report.
    """

    name: str
    way: str
    failed_before: bool
    safe: bool
    bitwise: bool
    apart: float
    times_usual: float
    times_chance: float
    sentence: str

    @property
    def wrong(self) -> bool:
        """Called safe with another function, or with FP16 outputs that are not finite."""
        return self.safe and not (self.apart <= 1e-5 and self.times_usual < float("inf"))


def outputs(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every floating-point tensor of a forward pass, in FP32; cached keys and values are none of the function's outputs."""
    dtype = next(model.parameters()).dtype
    cache = {"use_cache": False} if "use_cache" in model.forward.__code__.co_varnames else {}
    with torch.no_grad():
        given = model(**{k: x.to(dtype) if x.is_floating_point() else x for k, x in batch.items()}, **cache)
    return {k: x.float() for k, x in given.items() if isinstance(x, Tensor) and x.is_floating_point()}


def distance(exact: dict[str, Tensor], half: dict[str, Tensor]) -> float:
    """KL in nats, without logits the largest relative difference; inf where something is not finite."""
    if not all(bool(x.isfinite().all()) for x in half.values()):
        return float("inf")
    nats = divergence(exact, half)
    return difference(exact, half) if nats is None else max(nats, 0.0)


def tried(
    name: str,
    way: str,
    plain: Any,
    blown: Any,
    batch: dict[str, Tensor],
    judged: dict[str, Tensor],
    folder: Path | None = None,
) -> Trial:
    """Rescales the blown-up model; with a folder the result goes through stock `save_pretrained` and `from_pretrained`."""
    exact = outputs(plain, judged)
    before = outputs(blown, judged)
    assert difference(exact, before) <= 1e-5, f"{name}, {way}: the blow-up itself changes the function"
    usual = distance(exact, outputs(as_half(plain, folder), judged)) + 1e-8
    failed_before = not distance(before, outputs(copy.deepcopy(blown).half(), judged)) <= 2 * usual
    state = {k: x.clone() for k, x in blown.state_dict().items()}
    report = rescale_for_fp16(blown, batch)
    assert all(torch.equal(x, state[k]) for k, x in blown.state_dict().items()), "the given model has changed"
    if not report.safe:
        assert report.refused
        assert report.model is None
        return Trial(name, way, failed_before, False, False, *[float("nan")] * 3, report.sentence)
    assert all(after >= 0 for _, after in report.headroom_bits.values())
    apart = max(difference(outputs(blown, each), outputs(report.model, each)) for each in (batch, judged))
    times_usual = distance(exact, outputs(as_half(report.model, folder), judged)) / usual
    chance = max(of_twins(plain, exact, judged)) / usual if times_usual > 1.5 else 1.0
    return Trial(
        name, way, failed_before, True, report.bitwise, apart, times_usual, times_usual / chance, report.sentence
    )


def of_twins(plain: Any, exact: dict[str, Tensor], batch: dict[str, Tensor]) -> list[float]:
    """What chance makes of the divergence: weights that lie near a tie between two FP16 numbers are rounded to either, at random."""
    found = []
    for seed in range(TWINS):
        draw, twin = torch.Generator().manual_seed(seed), copy.deepcopy(plain)
        for parameter in twin.parameters():
            x = parameter.data
            spacing = 2.0 ** (x.abs().clamp_min(2.0**-14).frexp().exponent.float() - 11)
            below = (x / spacing).floor() * spacing
            either = below + spacing * (torch.rand(x.shape, generator=draw) < 0.5)
            parameter.data = either.where(((x - below) / spacing - 0.5).abs() < TIE, x)
        found.append(distance(exact, outputs(twin.half(), batch)))
    return found


def as_half(model: Any, folder: Path | None) -> Any:
    """The model in FP16; with a folder as stock loading gives it, which leaves some modules of some families in FP32."""
    if folder is None:
        return copy.deepcopy(model).half()
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, dtype=torch.float16).eval()


def of_family(family: Family, exponents: dict[str, int], folder: Path | None = None) -> Trial:
    """A family of `FAMILIES`, blown up by hand-written factors."""
    way = ", ".join(f"{key} 2^{n}" for key, n in exponents.items())
    return tried(
        family.name, way, family.plain(), family.blown_up(exponents), family.inputs(), family.inputs(7, JUDGED_ROWS), folder
    )  # fmt: skip


def of_architecture(name: str) -> Iterator[Trial]:
    """Any architecture, with up to three pairs of parameters that were found by trying, each multiplied and divided by 2^24."""
    model = architectures.made(name)
    plain, batch = copy.deepcopy(model), architectures.inputs(model)
    judged = architectures.inputs(model, 7, JUDGED_ROWS)
    for way, multiplied, divided in architectures.symmetries(model, batch):
        architectures.scale(multiplied, 2.0**BITS)
        architectures.scale(divided, 2.0**-BITS)
        yield tried(name, way, plain, model, batch, judged)
        architectures.scale(multiplied, 2.0**-BITS)
        architectures.scale(divided, 2.0**BITS)


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
