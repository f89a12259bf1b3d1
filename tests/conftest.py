"""Tests marked `gpu` run where there is a CUDA device; elsewhere they are skipped, with that reason."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Workers side by side, and the processes that they start, would wait for each other's threads.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from tests.each import forget_accelerators


@pytest.fixture
def fresh_accelerator_state() -> Iterator[None]:
    """The test starts and ends without an Accelerator."""
    forget_accelerators()
    yield
    forget_accelerators()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
