"""On a GPU gradient statistics are what they are on the CPU, and nothing waits for them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_amp.precision import FP16_FORMAT
from hf_amp.scaling.step import multiply_, unscale_and_check_
from hf_amp.statistics import (
    PendingTransfer,
    amax_of_each,
    count_non_finite,
    exact_norm,
    norm_and_amax,
    sample_underflow,
    to_host,
    total_amax,
    underflow_fraction,
    underflow_of_each,
)
from tests.each import for_each
from tests.host_reads import count_synchronisations

pytestmark = pytest.mark.gpu

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def gradients(*dtypes: torch.dtype) -> list[Tensor]:
    """Of several sizes, an empty one among them, on the CPU; magnitudes around 1e-5, where FP16 underflows."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3000, 7), (), (0,), (17,), (2, 3, 5), (5000,)]
    return [(torch.randn(shape, generator=generator) * 1e-5).to(dtype) for dtype in dtypes for shape in shapes]


@pytest.mark.parametrize("dtypes", [[torch.float32], DTYPES], ids=["fp32", "mixed"])
def test_statistics_are_those_of_the_cpu(dtypes: list[torch.dtype]) -> None:
    """Norm, amax, underflow and its cure, of all gradients and of each; the samples are the same ones."""

    def found(held: list[Tensor], device: torch.device) -> list[Tensor]:
        filled = [g for g in held if g.numel()]
        half, factor = sample_underflow(held, FP16_FORMAT, seed=3), torch.full((), 4.0, device=device)
        return [
            norm_and_amax(held, device, amax=False)[0], total_amax(held, device), *half.counts, half.cure,
            *amax_of_each(held, device), *underflow_of_each(filled, FP16_FORMAT, factor, seed=3),
        ]  # fmt: skip

    here = gradients(*dtypes)
    there = [gradient.to(CUDA) for gradient in here]
    found(there, CUDA)
    with count_synchronisations() as waits:
        on_cuda = found(there, CUDA)
    assert waits.sources == []
    assert {x.device.type for x in on_cuda} == {CUDA.type}
    # Norms of FP16 and BF16 tensors come in their own precision.
    expected = [figure for x in found(here, CPU) for figure in x.reshape(-1).tolist()]
    assert [figure for x in on_cuda for figure in x.reshape(-1).tolist()] == pytest.approx(
        expected, rel=1e-5 if len(dtypes) == 1 else 1e-2
    )
    assert exact_norm(there, CUDA).item() == pytest.approx(exact_norm(here, CPU).item(), rel=1e-5)


@for_each("bad", [math.inf, -math.inf, math.nan])
@for_each("dtype", DTYPES)
def test_one_bad_element_is_seen(dtype: torch.dtype, bad: float) -> None:
    """In the norm, in the amax and while dividing, in every dtype; and is counted."""
    held = [gradient.to(CUDA) for gradient in gradients(dtype)]
    one = torch.ones((), device=CUDA)
    assert unscale_and_check_(held, one, CUDA).item() == 0
    held[0].view(-1)[20_999] = bad
    assert not norm_and_amax(held, CUDA, amax=False)[0].isfinite().item()
    assert not total_amax(held, CUDA).isfinite().item()
    assert unscale_and_check_(held, one, CUDA).item() == 1
    assert count_non_finite(held) == ((0, 1) if math.isnan(bad) else (1, 0))


@for_each("first", ["cpu", "cuda"])
@for_each("target", ["cpu", "cuda"])
def test_gradients_on_two_devices_are_one_set(first: str, target: str) -> None:
    """What a large, slow tensor on the GPU gives is not used on the CPU before it has arrived."""
    device, other = torch.device(target), "cuda" if first == "cpu" else "cpu"
    for seed in range(5):
        torch.manual_seed(seed)
        held = [torch.randn(2**22, device=first), torch.randn(2**22, device=other)]
        held[0][0], held[1][0] = 100.0, 200.0
        squares = sum(gradient.double().square().sum().item() for gradient in held)
        assert total_amax(held, device).item() == 200.0
        assert norm_and_amax(held, device, amax=False)[0].item() == pytest.approx(math.sqrt(squares), rel=1e-4)
        assert underflow_fraction(sample_underflow([g * 1e-8 for g in held], FP16_FORMAT, seed).counts.tolist()) == 1.0
        inverse = torch.full((), 0.5, device=device)
        assert unscale_and_check_(held, inverse, device).item() == 0
        multiply_(held, inverse)
        assert [gradient[0].item() for gradient in held] == [25.0, 50.0]
        held[seed % 2][-1] = math.nan
        assert unscale_and_check_(held, inverse, device).item() == 1


def test_a_pending_read_does_not_wait() -> None:
    """Values queued behind half a second of work: starting the read and asking whether it is ready returns at once, and
    the result is what they were then, in pinned memory."""
    x = torch.randn(8192, 8192, device=CUDA)
    values = {"norm": torch.tensor(0.5, device=CUDA), "count": torch.tensor(7, device=CUDA)}
    x @ x  # loads what products need
    assert PendingTransfer(values).result() == {"norm": 0.5, "count": 7.0}
    with count_synchronisations() as waits:
        for _ in range(20):
            x @ x
        values["norm"] += 1
        pending = PendingTransfer(values)
        values["norm"] += 1
        was_ready = pending.ready()
    assert waits.sources == []
    assert not was_ready
    assert pending.result() == {"norm": 1.5, "count": 7.0}
    assert pending.ready()


def test_a_pending_read_is_pinned_whatever_the_default_device_is() -> None:
    """`torch.set_default_device("cuda")` has no say in where the host's memory is."""
    with CUDA:
        pending = PendingTransfer({"norm": torch.tensor(0.5)})
    assert pending._host[0][1].is_pinned()
    assert pending.result() == {"norm": 0.5}


def test_a_read_is_one_synchronisation() -> None:
    """However many values there are, of whatever dtype."""
    values = {str(i): torch.tensor(i, dtype=dtype, device=CUDA) for i, dtype in enumerate(DTYPES * 4)}
    with count_synchronisations() as waits:
        host = to_host(values)
    assert waits.count == 1, waits.sources
    assert host == {str(i): float(i) for i in range(12)}
