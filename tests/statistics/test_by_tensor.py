"""Statistics of each tensor are those that a plain loop finds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_amp.precision import FP16_FORMAT
from hf_amp.statistics import amax_of_each, underflow_fraction, underflow_of_each
from tests.host_reads import count_host_reads


def tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [
        torch.randn(shape, generator=generator) * scale for shape, scale in (((3, 5), 1.0), ((900,), 1e-5), ((), 7.0))
    ]
    return [*made, torch.zeros(4), torch.zeros(0), torch.randn(50_000, generator=generator) * 1e-5, made[0].half()]


def test_amax_is_that_of_each() -> None:
    """Any shape and dtype, empty ones too, without a host read."""
    with count_host_reads() as reads:
        peaks = amax_of_each(tensors(), torch.device("cpu"))
    assert reads.count == 0
    assert peaks.tolist() == [float(x.abs().max()) if x.numel() else 0.0 for x in tensors()]


def test_what_is_not_finite_shows() -> None:
    """An infinity is the largest, and NaN stays NaN."""
    peaks = amax_of_each([torch.tensor([1.0, -torch.inf]), torch.tensor([1.0, torch.nan])], torch.device("cpu"))
    assert peaks[0] == torch.inf
    assert peaks[1].isnan()


@pytest.mark.parametrize("factor", [1.0, 2.0**10])
def test_underflow_is_that_of_each(factor: float) -> None:
    """The share below FP16's smallest normal number, after scaling; of large tensors to the sample's precision; NaN of zeros alone."""
    with count_host_reads() as reads:
        counts = underflow_of_each(tensors(), FP16_FORMAT, torch.tensor(factor), seed=3)
    assert reads.count == 0
    for found, x in zip(counts.tolist(), tensors(), strict=True):
        small = (x.float() * factor).abs() < FP16_FORMAT.smallest_normal
        expected = float(small.float().mean()) if x.any() else math.nan
        assert underflow_fraction(found) == pytest.approx(expected, abs=0.05 if x.numel() > 1024 else 1e-6, nan_ok=True)


def test_the_sample_depends_on_the_seed_alone() -> None:
    """Ranks with the same gradients tell the same; the user's random numbers are not touched."""
    state = torch.get_rng_state()
    twice = [underflow_of_each(tensors(), FP16_FORMAT, torch.ones(()), seed=5) for _ in range(2)]
    assert torch.equal(*twice)
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_gives_nothing() -> None:
    """No tensors, no figures."""
    assert amax_of_each([], torch.device("cpu")).shape == (0,)
    assert underflow_of_each([], FP16_FORMAT, torch.ones(()), seed=0).shape == (0, 5)
