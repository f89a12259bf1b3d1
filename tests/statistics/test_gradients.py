"""Gradient statistics equal what slow and obvious code finds, and stay on the device."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from hf_amp.fallback.diagnosis import non_finite_names
from hf_amp.precision import FP16_FORMAT, FP32_FORMAT
from hf_amp.statistics import (
    SAMPLES,
    are_finite,
    by_device_and_dtype,
    collect,
    count_non_finite,
    exact_norm,
    norm_and_amax,
    sample_underflow,
    total_amax,
    underflow_fraction,
    underflow_of_each,
)
from tests.device_work import OnDevice, pretended_device
from tests.each import for_each
from tests.host_reads import count_host_reads

CPU = torch.device("cpu")
# Tensors without values: whatever needs one raises, and the branches taken are those of an accelerator.
META = torch.device("meta")
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
LAST_DIGITS = 4 * torch.finfo(torch.float32).eps
NON_FINITE = [math.inf, -math.inf, math.nan]


def elements(gradients: list[Tensor]) -> list[float]:
    """Every element of every tensor, as a Python number."""
    return [value for gradient in gradients for value in gradient.double().reshape(-1).tolist()]


class Measured(NamedTuple):
    """Norm and largest magnitude of the same gradients."""

    norm: Tensor
    amax: Tensor


def measure(gradients: list[Tensor], device: torch.device) -> Measured:
    """Both measures as hf_amp takes them."""
    return Measured(norm_and_amax(gradients, device, amax=False)[0], total_amax(gradients, device))


def norm_of(gradients: list[Tensor]) -> float:
    return math.sqrt(math.fsum(value * value for value in elements(gradients)))


def amax_of(gradients: list[Tensor]) -> float:
    return max((abs(value) for value in elements(gradients)), default=0.0)


def underflow_of(gradients: list[Tensor], smallest_normal: float) -> float:
    values = elements(gradients)
    return sum(0 < abs(value) < smallest_normal for value in values) / len(values)


def random_gradients(seed: int, dtypes: list[torch.dtype]) -> list[Tensor]:
    """Seven tensors of random shapes, an empty and a 0-d one among them; magnitudes from 1e-4 to 1e1."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3,), (), (0,), (5, 4), (2, 3, 2), (17,), (1, 1)]
    return [
        (torch.randn(shape, generator=generator) * 10.0 ** (seed % 6 - 4)).to(dtypes[i % len(dtypes)])
        for i, shape in enumerate(shapes)
    ]


def optimizer_with(*gradients: Tensor | None) -> torch.optim.Optimizer:
    """An optimizer whose parameters hold these gradients, the first in a group of its own."""
    parameters = []
    for gradient in gradients:
        parameter = nn.Parameter(torch.zeros((1,) if gradient is None else gradient.shape))
        if gradient is not None:
            parameter = nn.Parameter(torch.zeros(gradient.shape, dtype=gradient.dtype))
            parameter.grad = gradient
        parameters.append(parameter)
    return torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=0.1)


def sparse(indices: list[int], values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
    """An uncoalesced sparse vector of length 5."""
    made = torch.sparse_coo_tensor(
        torch.tensor([indices]), torch.tensor(values, dtype=dtype), (5,), check_invariants=True
    )
    assert not made.is_coalesced()
    return made


# ---- collect ------------------------------------------------------------------------------------------------


def test_gradients_are_collected_in_parameter_order():
    """Over all groups, and the very tensors, so that they can be unscaled in place."""
    first, second, third = torch.ones(2), torch.zeros(3), torch.ones(1)
    collected = collect(optimizer_with(first, second, third))
    assert [id(gradient) for gradient in collected] == [id(first), id(second), id(third)]


def test_parameters_without_gradients_are_left_out():
    """Frozen and unused parameters have nothing to say."""
    gradient = torch.ones(2)
    assert len(collect(optimizer_with(None, gradient, None))) == 1
    assert collect(optimizer_with(None)) == []


def test_collecting_dense_gradients_reads_nothing():
    """The healthy path does not wait for the device."""
    optimizer = optimizer_with(torch.ones(2), None, torch.ones(3, dtype=torch.float16))
    with count_host_reads() as reads:
        collect(optimizer)
    assert reads.sources == []


def test_sparse_duplicates_are_added_up():
    """What the optimizer would apply to one row is one value."""
    optimizer = optimizer_with(sparse([1, 3, 1], [2.0, 5.0, 4.0]))
    (values,) = collect(optimizer)
    assert sorted(values.tolist()) == [5.0, 6.0]


def test_sparse_duplicates_that_overflow_only_in_sum_are_seen():
    """64000 + 64000 is infinite in FP16, though neither part is."""
    gradients = collect(optimizer_with(sparse([2, 2], [64000.0, 64000.0], torch.float16)))
    assert count_non_finite(gradients) == (1, 0)
    assert measure(gradients, CPU).amax.isinf()


def test_a_change_to_sparse_values_reaches_the_optimizer():
    """The values that are collected are those that the optimizer applies, coalesced before or now."""
    for gradient in (sparse([1, 1], [2.0, 4.0]), sparse([1, 1], [2.0, 4.0]).coalesce()):
        optimizer = optimizer_with(gradient)
        collect(optimizer)[0].mul_(0.5)
        assert optimizer.param_groups[0]["params"][0].grad.to_dense().tolist() == [0.0, 3.0, 0.0, 0.0, 0.0]


def test_groups_have_one_device_and_dtype_and_lose_nothing():
    """Every gradient is in the group of its device and dtype, in order."""
    gradients = [torch.ones(1, dtype=dtype) for dtype in DTYPES * 2]
    groups = by_device_and_dtype(gradients)
    assert list(groups) == [(CPU, dtype) for dtype in DTYPES]
    for i, group in enumerate(groups.values()):
        assert [id(gradient) for gradient in group] == [id(gradients[i]), id(gradients[i + len(DTYPES)])]


# ---- norm and amax ------------------------------------------------------------------------------------------


@for_each("seed", range(20))
def test_norm_and_amax_of_fp32_gradients(seed):
    """Both equal a sum over Python numbers."""
    gradients = random_gradients(seed, [torch.float32])
    measured = measure(gradients, CPU)
    assert measured.norm.item() == pytest.approx(norm_of(gradients), rel=1e-5)
    assert measured.amax.item() == amax_of(gradients)


@for_each("dtypes", [[dtype] for dtype in DTYPES] + [DTYPES])
@for_each("seed", range(3, 6))
def test_norm_and_amax_of_any_dtypes(seed, dtypes):
    """Mixed dtypes are measured as one set; a norm is as exact as the coarsest dtype, a maximum as FP32."""
    gradients = random_gradients(seed, dtypes)
    measured = measure(gradients, CPU)
    assert measured.norm.item() == pytest.approx(norm_of(gradients), rel=2 * torch.finfo(torch.bfloat16).eps)
    assert measured.amax.item() == pytest.approx(amax_of(gradients), rel=torch.finfo(torch.float32).eps)


@for_each("dtypes", [[torch.float32], DTYPES])
@for_each("bad", NON_FINITE)
@for_each("where", [0, 3, 5])
def test_one_bad_element_shows_in_norm_and_amax(where, bad, dtypes):
    """Infinity and NaN are never lost, whichever tensor they are in."""
    gradients = random_gradients(4, dtypes)
    gradients[where].view(-1)[-1] = bad
    measured = measure(gradients, CPU)
    assert not measured.norm.isfinite()
    assert not measured.amax.isfinite()


def test_a_large_negative_element_is_the_largest_magnitude():
    """Magnitude has no sign."""
    assert measure([torch.tensor([1.0, -7.0, 3.0])], CPU).amax == 7.0


@for_each("gradients", [[], [torch.zeros(0)], [torch.zeros(0), torch.zeros(2, 0)]])
def test_nothing_measures_as_zero(gradients):
    """No gradients, or only empty ones, have norm and amax 0."""
    measured = measure(gradients, CPU)
    assert (measured.norm.item(), measured.amax.item()) == (0.0, 0.0)


@for_each("dtypes", [[dtype] for dtype in DTYPES] + [DTYPES])
def test_measures_are_scalars_in_fp32_on_the_device_asked_for(dtypes):
    """Whatever the gradients are, both measures have shape [], float32, and the device asked for."""
    for measured in measure(random_gradients(1, dtypes), CPU):
        assert (measured.shape, measured.dtype, measured.device) == ((), torch.float32, CPU)
        assert not measured.requires_grad


def test_measuring_leaves_the_gradients_alone():
    """Statistics change nothing."""
    gradients = random_gradients(2, DTYPES)
    before = [gradient.clone() for gradient in gradients]
    measure(gradients, CPU)
    sample_underflow(gradients, FP16_FORMAT, 0)
    count_non_finite(gradients)
    assert all(torch.equal(was, now) for was, now in zip(before, gradients, strict=True))


def test_the_exact_norm_is_finite_wherever_the_gradients_are():
    """Squares beyond the range of FP32 do not spoil it; those of the fast norm do, which is why there are two."""
    gradients = [torch.full((3,), 2e19), torch.full((4,), -1e30), torch.ones(2, dtype=torch.bfloat16)]
    assert exact_norm(gradients, CPU).item() == pytest.approx(norm_of(gradients), rel=1e-6)
    assert norm_and_amax(gradients, CPU, amax=False)[0].isinf()


@for_each("exponent", [-130, -100, -70, 0, 70, 100, 115])
@for_each("dtypes", [[torch.float32], [torch.bfloat16, torch.float32, torch.float64]])
def test_the_exact_norm_is_that_of_fp64_to_the_last_digits_of_fp32(dtypes, exponent):
    """Within 4 roundings of FP32, from subnormal values to near the end of its range; groups of several dtypes too."""
    generator = torch.Generator().manual_seed(exponent)
    sizes = [(1,), (300, 7), (2**17,), (0,)]
    values = [torch.randn(size, generator=generator, dtype=torch.float64) * 2.0**exponent for size in sizes]
    gradients = [value.to(dtype) for value in values for dtype in dtypes]
    expected = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients))
    assert exact_norm(gradients, CPU).item() == pytest.approx(
        expected, rel=LAST_DIGITS, abs=FP32_FORMAT.smallest_subnormal
    )


def test_the_exact_norm_of_millions_of_elements():
    """Adding one square after the other would be off by a thousandth."""
    gradients = [torch.randn(2**24, generator=torch.Generator().manual_seed(0)) * 1e20]
    expected = torch.linalg.vector_norm(gradients[0], dtype=torch.float64).item()
    assert exact_norm(gradients, CPU).item() == pytest.approx(expected, rel=LAST_DIGITS)


def test_the_exact_norm_at_the_ends():
    """Nothing and zeros have the norm 0; where the norm itself leaves the range it is FP32's largest value, and NaN stays."""
    assert exact_norm([], CPU).item() == exact_norm([torch.zeros(3), torch.zeros(0)], CPU).item() == 0.0
    wide = torch.tensor([1e300], dtype=torch.float64)
    for beyond in (torch.full((4,), 3e38), wide, torch.tensor([math.inf])):
        assert exact_norm([torch.ones(2), beyond], CPU).item() == FP32_FORMAT.largest
    assert exact_norm([torch.tensor([1.0, math.nan])], CPU).isnan()


def test_the_exact_norm_reads_nothing_and_is_on_the_device_asked_for():
    """Gradients of several devices come together there, as shape [], float32."""
    gradients = [torch.ones(3), torch.ones(2, dtype=torch.bfloat16, device=META)]
    with count_host_reads() as reads:
        norm = exact_norm(gradients, META)
    assert reads.count == 0
    assert (norm.shape, norm.dtype, norm.device) == ((), torch.float32, META)


@for_each("seed", range(5))
def test_both_norms_agree_within_the_range(seed):
    """Where the fast norm is finite, the exact one is the same to FP32's precision."""
    gradients = random_gradients(seed, [torch.float32, torch.float64])
    fast, exact = norm_and_amax(gradients, CPU, amax=False)[0], exact_norm(gradients, CPU)
    assert fast.item() == pytest.approx(exact.item(), rel=1e-6)
    assert (exact.shape, exact.dtype) == ((), torch.float32)


def large_and_small(seed: int, dtype: torch.dtype) -> list[Tensor]:
    """A large tensor among 60 small ones, some of them transposed, which together are more than is copied at once."""
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(int(n), 3, generator=generator) for n in torch.randint(1, 60, (60,), generator=generator)]
    gradients.insert(30, torch.randn(200, 1000, generator=generator))  # more than is read at once
    return [(g.t() if i % 3 == 0 else g).to(dtype) for i, g in enumerate(gradients)]


@for_each("dtype", [torch.float32, torch.float64])
@for_each("seed", range(3))
def test_small_tensors_are_read_together_and_none_is_missed(seed, dtype):
    """Beside a large tensor, norm and amax are those of all; taken at once as well."""
    gradients = large_and_small(seed, dtype)
    measured = measure(gradients, CPU)
    assert measured.norm.item() == pytest.approx(norm_of(gradients), rel=1e-5)
    assert measured.amax.item() == pytest.approx(amax_of(gradients), rel=1e-7)
    assert norm_and_amax(gradients, CPU) == (pytest.approx(norm_of(gradients), rel=1e-5), measured.amax)
    assert norm_and_amax(gradients, CPU, norm=False, amax=False) == (None, None)


@for_each("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_at_once_in_fp32(dtype):
    """Taken with the amax, the norm is as exact as one of FP32."""
    gradients = [g * 100 for g in large_and_small(0, dtype)]
    norm, amax = norm_and_amax(gradients, CPU)
    assert norm.item() == pytest.approx(norm_of(gradients), rel=1e-5)
    assert amax.item() == amax_of(gradients)


@for_each("bad", NON_FINITE)
def test_one_bad_element_in_any_tensor_shows(bad):
    """Wherever it is, neither norm nor amax stays finite."""
    for index in range(61):
        gradients = large_and_small(0, torch.float32)
        gradients[index][-1, -1] = bad
        assert not any(figure.isfinite() for figure in measure(gradients, CPU))


# ---- underflow ----------------------------------------------------------------------------------------------


def fraction_of(gradients, number_format, seed):
    """The underflow fraction, by way of the host."""
    return underflow_fraction(sample_underflow(gradients, number_format, seed).counts.tolist())


EDGES = [0.0, -0.0, 2.0**-25, -(2.0**-24), 2.0**-15, -(2.0**-14), 2.0**-14, 1.0, 65504.0]


@for_each("dtype", DTYPES)
def test_subnormal_elements_underflow(dtype):
    """The smallest normal value does not count, what is below it does; of zeros 1.5 times as many as are the smallest number."""
    gradient = torch.tensor(EDGES, dtype=dtype)
    subnormal = 3 - (dtype == torch.float16)  # which rounds 2^-25 to 0
    found = fraction_of([gradient], FP16_FORMAT, 0)
    assert found == pytest.approx((subnormal + 1.5) / len(EDGES))


def rounded_gradients(centre: float, spread: float) -> Tensor:
    """2^16 magnitudes, log-normal, as FP32 has them."""
    generator = torch.Generator().manual_seed(0)
    return torch.exp2(centre + spread * torch.randn(2**8, 2**8, generator=generator))


@for_each("centre", [-8.0, -14.0, -18.0, -21.0, -24.0, -28.0, -34.0])
@for_each("spread", [1.5, 3.0, 5.0])
@for_each("unused", [0.0, 0.5, 0.9])
def test_zeros_count_as_far_as_the_format_has_made_them(centre, spread, unused):
    """Against the same gradient in FP32, of which rows are zero there too, as those of an embedding that no token asks for."""
    exact = rounded_gradients(centre, spread)
    exact[: int(unused * len(exact))] = 0
    in_half = exact.half()
    lost = (exact != 0) & (in_half.abs() < FP16_FORMAT.smallest_normal)
    found = fraction_of([in_half], FP16_FORMAT, 0)
    if math.isnan(found):  # the format's end is where most of the gradient is, so that zeros of both kinds look alike
        assert centre <= -24 or not in_half.any()
    else:
        truth, share_in_use = lost.float().mean().item(), 1 - unused
        assert truth - 0.08 <= found <= truth + 0.12 * share_in_use


@for_each("seed", range(10))
def test_the_fraction_of_small_tensors_is_exact(seed):
    """Tensors up to the sample's size are counted whole, and weigh by their size."""
    gradients = [gradient * 1e-2 for gradient in random_gradients(seed, [torch.float32])]
    gradients.append(torch.full((1024,), 2.0**-20))
    expected = underflow_of(gradients, FP16_FORMAT.smallest_normal)
    assert fraction_of(gradients, FP16_FORMAT, 0) == pytest.approx(expected, abs=1e-5)


@for_each("share", [0.0, 0.02, 0.3, 0.9, 1.0])
def test_the_fraction_of_large_tensors_is_close(share):
    """Samples of 16 large tensors, of different sizes and shares, give it to 0.02."""
    torch.manual_seed(0)
    gradients = []
    for i in range(16):
        gradient = torch.rand(10_000 + 2_000 * i, 2) + 1
        gradient[torch.rand_like(gradient) < share * (1 + i % 2) / 1.5] = 2.0**-20
        gradients.append(gradient)
    expected = underflow_of(gradients, FP16_FORMAT.smallest_normal)
    assert fraction_of(gradients, FP16_FORMAT, 0) == pytest.approx(expected, abs=0.02)


def test_a_large_tensor_outweighs_a_small_one():
    """The fraction is one of elements, not of tensors."""
    gradients = [torch.full((10,), 2.0**-20), torch.ones(99_990)]
    assert fraction_of(gradients, FP16_FORMAT, 0) == pytest.approx(1e-4, abs=1e-4)


def test_the_format_draws_the_line():
    """Its smallest normal value is the limit."""
    edge, number_format = FP16_FORMAT.smallest_normal, FP16_FORMAT
    gradient = torch.tensor([edge / 2, edge / 2, edge, 2 * edge], dtype=torch.float64)
    assert fraction_of([gradient], number_format, 0) == 0.5


@for_each("exponent", range(-20, 4))
def test_the_value_below_a_power_of_two_belongs_to_the_power_before(exponent):
    """The largest number below 2^-14 is subnormal, and each number asks for the scale that its own exponent needs."""
    below = torch.nextafter(torch.tensor(2.0**exponent), torch.tensor(0.0))
    found = sample_underflow([below.repeat(3)], FP16_FORMAT, 0)
    assert underflow_fraction(found.counts.tolist()) == float(exponent <= -14)
    assert found.cure.item() == 2.0 ** (-14 - exponent + 1)


@for_each("bad", NON_FINITE)
def test_bad_elements_do_not_underflow(bad):
    """An overflowing step still gives a fraction."""
    assert fraction_of([torch.tensor([bad, 2.0**-20])], FP16_FORMAT, 0) == 0.5


def test_of_zeros_alone_nothing_is_known():
    """Nor of no elements: the fraction is NaN, which no metric shows."""
    for gradients in ([torch.zeros(0), torch.zeros(0, 3)], [torch.zeros(100)]):
        assert math.isnan(fraction_of(gradients, FP16_FORMAT, 0))


def test_sampling_leaves_the_random_state_alone():
    """Dropout and shuffling are the same with monitoring on or off."""
    before = torch.get_rng_state()
    sample_underflow([torch.ones(3 * SAMPLES)], FP16_FORMAT, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_default_device_changes_no_sample():
    """`torch.set_default_device` says where a user's tensors go, not where a sample is drawn."""
    tensors = [torch.randn(5000) * 2.0**-15, torch.randn(5000, dtype=torch.float64)]
    expected = (sample_underflow(tensors, FP16_FORMAT, 3), underflow_of_each(tensors, FP16_FORMAT, torch.ones(()), 3))
    one = torch.ones(())
    with META:
        found = sample_underflow(tensors, FP16_FORMAT, 3), underflow_of_each(tensors, FP16_FORMAT, one, 3)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_seed_chooses_the_sample():
    """Ranks with the same gradients and seed agree to the last bit; other seeds look at other elements."""
    torch.manual_seed(0)
    gradient = torch.rand(10 * SAMPLES) * 2 * FP16_FORMAT.smallest_normal
    fractions = [fraction_of([gradient], FP16_FORMAT, seed) for seed in range(20)]
    again = [fraction_of([gradient.clone()], FP16_FORMAT, seed) for seed in range(20)]
    assert fractions == again
    assert len(set(fractions)) > 1
    assert sum(fractions) / len(fractions) == pytest.approx(0.5, abs=0.02)


def cure_of(values: list[float], tolerated: int) -> float:
    """The obvious reference: the smallest power of two that leaves no more than `tolerated` values subnormal."""
    bits = 70
    while sum(0 < abs(v) * 2.0 ** (bits - 1) < FP16_FORMAT.smallest_normal for v in values) <= tolerated:
        bits -= 1
    return 2.0**bits


@for_each("seed", range(10))
def test_the_cure_is_the_power_of_two_that_lifts_all_but_the_tolerated_share(seed):
    """Of 1,000 elements, some of them zero, all but the one in 1,024 that is tolerated become normal, by no bit more."""
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(1000, generator=generator) * 2.0 ** (seed * 4 - 20)
    gradient[::7] = 0.0
    assert sample_underflow([gradient], FP16_FORMAT, 0).cure.item() == cure_of(gradient.double().tolist(), 0)


@for_each("lost", [0, 1, 2, 3])
def test_a_tolerated_share_asks_for_nothing(lost):
    """Two elements of 2,048 may be lost, a third asks to be lifted; either way small elements tell how far."""
    gradient = torch.full((1024,), 1.0)
    other = torch.full((1024,), 1.0)
    gradient[:lost] = 2.0**-20
    expected = 2.0**-14 if lost <= 2 else 2.0**6
    assert sample_underflow([gradient, other], FP16_FORMAT, 0).cure.item() == expected


@for_each("values", [[0.0] * 5, [math.nan] * 5, [0.0, math.nan]])
def test_nothing_but_zeros_asks_for_nothing(values):
    """Zeros may be beyond cure, and NaN tells nothing: no scale is asked for."""
    assert sample_underflow([torch.tensor(values)], FP16_FORMAT, 0).cure.item() == 0.0


# ---- host reads ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [[torch.float32], DTYPES], ids=["fp32", "mixed"])
def test_measuring_and_sampling_read_nothing(dtypes):
    """Neither waits for the device, on small, large and empty tensors."""
    gradients = [*random_gradients(0, dtypes), torch.ones(3 * SAMPLES)]
    with count_host_reads() as reads:
        measure(gradients, CPU)
        sample_underflow(gradients, FP16_FORMAT, 0)
    assert reads.sources == []


@pytest.mark.parametrize("dtypes", [[torch.float32], DTYPES], ids=["fp32", "mixed"])
def test_no_value_is_needed_on_an_accelerator_either(dtypes):
    """Tensors that have no values at all, and are not on the CPU, are measured and sampled without an error."""
    gradients = [torch.empty(5000, dtype=dtype, device=META) for dtype in dtypes * 2]
    counts, cure = sample_underflow(gradients, FP16_FORMAT, 0)
    results = [*measure(gradients, META), *counts, cure]
    assert {(result.shape, result.dtype, result.device) for result in results} == {((), torch.float32, META)}


@pytest.mark.gpu
def test_a_gpu_finds_what_the_cpu_finds():
    """Norm, amax, and what the same sample shows of underflow."""
    gradients = [gradient * 2.0**-13 for gradient in large_and_small(0, torch.float32)]
    here, there = ([g.to(device) for g in gradients] for device in ("cpu", "cuda"))
    expected, found = (
        [
            f
            for figure in (*measure(held, device), *sample_underflow(held, FP16_FORMAT, 0))
            for f in figure.reshape(-1).tolist()
        ]
        for held, device in ((here, CPU), (there, torch.device("cuda")))
    )
    assert found == pytest.approx(expected, rel=1e-5)


# ---- counting what is not finite ----------------------------------------------------------------------------


@for_each("seed", range(10))
def test_infinite_and_nan_elements_are_counted_apart(seed):
    """Both infinities count as infinite; the counts equal a loop over Python numbers."""
    gradients = random_gradients(seed, DTYPES)
    generator = torch.Generator().manual_seed(seed)
    for gradient in gradients:
        for bad in NON_FINITE:
            gradient[torch.rand(gradient.shape, generator=generator) < 0.2] = bad
    values = elements(gradients)
    assert count_non_finite(gradients) == (sum(map(math.isinf, values)), sum(map(math.isnan, values)))


@pytest.mark.parametrize("tensors", [1, 30])
def test_counting_reads_once(tensors):
    """One host read, however many tensors."""
    with count_host_reads() as reads:
        count_non_finite([torch.ones(3) for _ in range(tensors)])
    assert reads.count == 1, reads.sources


def test_counting_nothing_reads_nothing():
    """Without gradients there is nothing to wait for."""
    with count_host_reads() as reads:
        assert count_non_finite([]) == (0, 0)
    assert reads.count == 0


def test_finite_tensors_are_told_from_others() -> None:
    """One by one, in one read, whatever device and dtype; offloaded ones on `meta`, integers and empty ones count as finite."""
    bad = torch.tensor([1.0, math.inf])
    held = [
        torch.ones(3),
        bad,
        bad.half(),
        torch.ones(2, dtype=torch.bfloat16),
        torch.zeros(0),
        torch.ones(2, dtype=torch.int8),
    ]
    held += [torch.ones(2, device=META), torch.tensor([complex(0, math.nan)]), torch.tensor(math.nan)]
    with count_host_reads() as reads:
        found = are_finite(held)
    assert found == [True, False, False, True, True, True, True, False, False]
    assert reads.count == 1
    with pretended_device():
        assert are_finite([OnDevice(x) for x in held if not x.is_meta]) == found[:6] + found[7:]
    assert non_finite_names([("offloaded", torch.ones(2, device=META)), ("bad", bad)]) == ["bad"]
