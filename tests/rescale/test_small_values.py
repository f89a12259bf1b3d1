"""Values that are too small for FP16's bits are raised, as far as something can be moved, and nothing else pays for it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from hf_amp.rescale import rescale_for_fp16
from tests.each import for_each
from tests.rescale.families import FAMILIES
from tests.rescale.test_refusals import Block, batch
from tests.rescale.trials import of_family

BY_NAME = {family.name: family for family in FAMILIES}
SMALL = 2.0**-15


def error_in_half(model: torch.nn.Module, exact: torch.Tensor, x: torch.Tensor) -> float:
    """Root mean square."""
    return (copy.deepcopy(model).half()(x.half()).float() - exact).square().mean().sqrt().item()


def test_what_is_too_small_is_raised_though_nothing_overflows() -> None:
    """FP16 comes as near to FP32 as without the factors; the function is the same to the last bit."""
    small, plain, x = Block(F.relu, SMALL, 1 / SMALL), Block(F.relu, 1.0, 1.0), batch()
    report = rescale_for_fp16(small, x)
    assert report.safe
    assert "nothing overflowed" in report.sentence
    with torch.no_grad():
        exact = plain(x)
        assert torch.equal(report.model(x), small(x))
        usual = error_in_half(plain, exact, x)
        assert error_in_half(small, exact, x) > 4 * usual
        assert error_in_half(report.model, exact, x) < 1.5 * usual


def past_pytorch(x: torch.Tensor) -> torch.Tensor:
    """A function that no recording sees."""
    return torch.from_numpy(np.tanh(x.float().numpy())).to(x.dtype)


@for_each("between", [torch.sigmoid, past_pytorch])
def test_what_is_too_small_and_cannot_move_ends_nothing(between: Any) -> None:
    """What holds the factor, or turns out to hold it: the model is as safe as it was, and stays as it is."""
    report = rescale_for_fp16(Block(between, SMALL, 1.0), batch())
    assert report.safe, report.sentence
    assert report.sentence.startswith("Nothing to do")


def test_epsilons_move_where_that_raises_what_is_too_small() -> None:
    """The last norm of a T5 whose embedding reads out too has its factor from the residual stream, which fits."""
    trial = of_family(BY_NAME["T5ForConditionalGeneration"], {"stream": 13, "values 1": -16})
    assert trial.safe
    assert trial.bitwise
    assert trial.times_usual < 1.2
    assert "epsilons" in trial.sentence


def test_one_plus_weight_is_not_brought_below_one() -> None:
    """There FP16 would have too few bits for the weight, which is near -1; other parameters take the factor."""
    family = BY_NAME["Gemma2ForCausalLM"]
    report = rescale_for_fp16(family.blown_up({"stream": 20, "mlp": -1, "scores": -15}), family.inputs())
    assert report.bitwise
    assert all(isinstance(exponent, int) for exponent in report.exponents.values())
    plain = dict(family.plain().named_parameters())
    for name, parameter in report.model.named_parameters():
        if "norm" in name:
            assert (1 + parameter).mean() > (1 + plain[name]).mean() / 2, name
