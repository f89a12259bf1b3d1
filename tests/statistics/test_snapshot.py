"""`to_host` brings values to the host, exactly, all in one read."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_amp.statistics import PendingTransfer, elements_of, to_host
from tests.each import for_each
from tests.host_reads import count_host_reads


@for_each("tensors", [1, 2, 50])
def test_any_number_of_values_is_one_read(tensors):
    """The device is waited for once, however many values are wanted."""
    values = {f"value {i}": torch.tensor(float(i)) for i in range(tensors)}
    with count_host_reads() as reads:
        host = to_host(values)
    assert reads.count == 1, reads.sources
    assert host == {f"value {i}": float(i) for i in range(tensors)}


def test_nothing_to_read_is_no_read():
    """An empty mapping does not touch a device."""
    with count_host_reads() as reads:
        assert to_host({}) == {}
    assert reads.count == 0


def test_names_come_back_in_the_order_given():
    """The result can be zipped with what was asked for."""
    names = ["zeta", "alpha", "mid"]
    assert list(to_host({name: torch.tensor(1.0) for name in names})) == names


@for_each(
    ("value", "dtype"),
    [
        (0.1, torch.float64),
        (2.0**-149, torch.float32),
        (torch.finfo(torch.float32).max, torch.float32),
        (65504.0, torch.float16),
        (2.0**-24, torch.float16),
        (3.0, torch.bfloat16),
        (2**53 - 1, torch.int64),
        (-(2**31), torch.int32),
        (float("inf"), torch.float32),
        (float("-inf"), torch.float16),
    ],
)
def test_a_value_arrives_exactly(value, dtype):
    """Neither range nor digits of any format up to FP64 are lost on the way."""
    assert to_host({"value": torch.tensor(value, dtype=dtype)}) == {"value": value}


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=8))
def test_all_fp32_values_arrive_exactly(numbers):
    """Every FP32 number is itself on the host."""
    host = to_host({str(i): torch.tensor(number) for i, number in enumerate(numbers)})
    assert list(host.values()) == numbers


def test_a_nan_arrives_as_nan():
    """What is not a number stays that."""
    value = to_host({"value": torch.tensor(float("nan"))})["value"]
    assert value != value


def test_truth_values_arrive_as_numbers():
    """Flags are 0.0 and 1.0."""
    assert to_host({"yes": torch.tensor(True), "no": torch.tensor(False)}) == {"yes": 1.0, "no": 0.0}


def test_mixed_dtypes_share_one_read():
    """Flags, counters and figures go together."""
    values = {"flag": torch.tensor(True), "count": torch.tensor(7), "norm": torch.tensor(0.5)}
    with count_host_reads() as reads:
        host = to_host(values)
    assert (reads.count, host) == (1, {"flag": 1.0, "count": 7.0, "norm": 0.5})


def test_a_pending_read_gives_the_same_values():
    """Reading later is reading the same, also when the tensors have changed in the meantime."""
    values = {"flag": torch.tensor(True), "count": torch.tensor(7), "norm": torch.tensor(0.5)}
    expected = to_host(values)
    pending = PendingTransfer(values)
    values["norm"].zero_()
    assert pending.ready()
    assert pending.result() == pending.result() == expected


def test_starting_a_pending_read_reads_nothing():
    """Only asking for the result can wait."""
    with count_host_reads() as reads:
        PendingTransfer({"norm": torch.tensor(0.5), "count": torch.tensor(7)}).ready()
    assert reads.sources == []


def test_a_value_with_a_graph_can_be_read():
    """A loss is read without detaching it first, and keeps its graph."""
    weight = torch.tensor(2.0, requires_grad=True)
    loss = weight * 3
    assert to_host({"loss": loss}) == {"loss": 6.0}
    loss.backward()
    assert weight.grad == 3


def test_vectors_ride_in_the_same_read():
    """The elements of a tensor of shape [n] come under names of their own, one read for all."""
    values = {"a": torch.tensor(1.0), "v": torch.tensor([2.0, 3.0]), "none": torch.zeros(0), "b": torch.tensor(4)}
    with count_host_reads() as reads:
        host = to_host(values)
    assert reads.count == 1
    assert host == {"a": 1.0, "v[0]": 2.0, "v[1]": 3.0, "b": 4.0}
    assert list(host) == ["a", "v[0]", "v[1]", "b"]
    assert (elements_of(host, "v"), elements_of(host, "none")) == ([2.0, 3.0], [])
    assert PendingTransfer(values).result() == host
