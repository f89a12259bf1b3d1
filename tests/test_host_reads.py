"""The counter of host reads counts what reads, once, and nothing else."""

import numpy
import pytest
import torch
from torch import Tensor

from tests.each import for_each
from tests.host_reads import count_host_reads

READS = {
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist(),
    "tolist of a scalar": lambda x: x[0].tolist(),
    "bool": lambda x: bool(x[0] > 1),
    "if": lambda x: 1 if x[0] else 2,
    "float": lambda x: float(x[0]),
    "int": lambda x: int(x[0]),
    "numpy": lambda x: x.numpy(),
    "numpy.asarray": lambda x: numpy.asarray(x),
    "cpu": lambda x: x.cpu(),
    "print": lambda x: repr(x),
    "f-string": lambda x: f"{x}",
    "f-string of a scalar": lambda x: f"{x[0]:.2f}",
    "in": lambda x: 1.0 in x,
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "nonzero": lambda x: x.nonzero(),
    "boolean mask": lambda x: x[x > 1],
    "masked_select": lambda x: x.masked_select(x > 1),
    "unique": lambda x: x.unique(),
}

NO_READS = {
    "arithmetic": lambda x: (x * 2 + 1).sum().isfinite(),
    "indexing by integers": lambda x: x[torch.tensor([0, 2])],
    "where": lambda x: torch.where(x > 1, x, 0),
    "to its own device": lambda x: x.to(x.device),
    "another dtype": lambda x: x.to(torch.float16),
    "shape and dtype": lambda x: (x.shape, x.dtype, x.numel(), len(x)),
    "iteration": lambda x: list(x),
}


@pytest.fixture
def values() -> Tensor:
    return torch.arange(4.0)


@for_each("read", READS.values())
def test_a_read_counts_once(read, values):
    """Whatever brings values to the host counts as exactly one read."""
    with count_host_reads() as reads:
        read(values)
    assert reads.count == 1, reads.sources


@for_each("operation", NO_READS.values())
def test_what_stays_on_the_device_does_not_count(operation, values):
    """Operations that need no value on the host count as none."""
    with count_host_reads() as reads:
        operation(values)
    assert reads.sources == []


def test_reads_add_up_and_name_their_sources(values):
    """Several reads are counted one by one and named in order."""
    with count_host_reads() as reads:
        values[0].item()
        values.tolist()
        float(values[1])
    assert reads.sources == ["aten._local_scalar_dense.default", "tolist", "aten._local_scalar_dense.default"]


def test_reads_outside_of_the_block_do_not_count(values):
    """Counting starts and ends with the block."""
    values.tolist()
    with count_host_reads() as reads:
        pass
    values[0].item()
    assert reads.count == 0


def test_reads_in_backward_count(values):
    """A read in a gradient hook counts, so a training step can be counted as a whole."""
    weight = values.clone().requires_grad_()
    weight.register_hook(lambda gradient: gradient * float(gradient[0]))
    with count_host_reads() as reads:
        (weight * weight).sum().backward()
    assert reads.count == 1


def test_counting_changes_no_result(values):
    """Code under the counter computes what it computes without it."""
    with count_host_reads():
        seen = (values * 3).tolist()
    assert seen == [0.0, 3.0, 6.0, 9.0]
