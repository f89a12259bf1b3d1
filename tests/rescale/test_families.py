"""A model that overflows in FP16 becomes one of the same function that does not, in fifteen families and any other architecture."""

from __future__ import annotations

import random
from pathlib import Path

from tests.rescale.families import FAMILIES
from tests.rescale.trials import BITS, FURTHER, Trial, of_architecture, of_family, random_blow_up

DEFAULT = {
    "LlamaForCausalLM": ("stream", "scores"),
    "GPT2LMHeadModel": ("stream", "values"),
    "T5ForConditionalGeneration": ("stream",),
    "BertForMaskedLM": ("mlp",),
    "Gemma3ForCausalLM": ("stream",),
}


def as_near_as_usual(trial: Trial) -> bool:
    """In FP16 as near to FP32 as the model that was never blown up, or as what rounding alone makes of that one."""
    return trial.times_usual <= 1.5 or trial.times_chance <= 1


def assert_cured(trial: Trial) -> None:
    """It failed in FP16, and is now as good there as the model that was never blown up."""
    assert trial.failed_before, trial
    assert trial.safe, trial
    assert trial.apart <= 1e-5, trial
    assert trial.bitwise is (trial.apart == 0), trial
    assert as_near_as_usual(trial), trial


def test_every_way_is_made_safe(full_size: bool, tmp_path: Path) -> None:
    """Finite in pure FP16 through stock `from_pretrained`, FP32 outputs the same, no module in FP32."""
    for family in FAMILIES:
        for way in family.symmetries if full_size else DEFAULT.get(family.name, ()):
            saved = full_size or (family.name, way) == ("T5ForConditionalGeneration", "stream")
            assert_cured(of_family(family, {way: BITS}, tmp_path / f"{family.name}_{way}" if saved else None))


def test_there_are_fifteen_families_and_three_ways_each() -> None:
    """What the other tests go through is as much as is claimed."""
    assert len({f.name for f in FAMILIES}) == 15
    assert all(len(f.symmetries) >= 3 for f in FAMILIES)
    assert len(set(FURTHER)) >= 40


def test_further_architectures_get_no_wrong_answer(full_size: bool) -> None:
    """Whatever cancels out in them, found by trying: made safe, or refused in words."""
    for name in FURTHER if full_size else ("Phi3ForCausalLM",):
        found = list(of_architecture(name))
        assert found, name
        for trial in found:
            assert not trial.wrong, trial
            assert as_near_as_usual(trial), trial


def test_random_blow_ups_change_no_function_in_silence(full_size: bool) -> None:
    """Safe means the same function and finite in FP16; what is refused says why."""
    draw, count = random.Random(0), 1000 if full_size else 5
    trials = [of_family(*random_blow_up(draw)) for _ in range(count)]
    assert not [trial for trial in trials if trial.wrong]
    assert not [trial for trial in trials if trial.safe and not as_near_as_usual(trial)]
    assert sum(trial.safe for trial in trials) >= 0.95 * count
