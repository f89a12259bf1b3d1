"""Tests marked `gpu` run where there is a CUDA device; elsewhere they are skipped, with that reason.

What repeats itself, faults and random examples, does so as often as a suite has time for; with `--full-size`, which is how
`python -m tests.faults` runs it, as often as the published table says.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

try:
    from hypothesis import settings
except ImportError:  # `pytest -m gpu` needs PyTorch, transformers and accelerate alone
    settings = None

# Workers side by side, and the processes that they start, would wait for each other's threads.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from tests.each import forget_accelerators


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full-size", action="store_true", help="as many faults and random examples as published")


def pytest_configure(config: pytest.Config) -> None:
    examples = 300 if config.getoption("--full-size") else 50
    if settings is None:
        return
    settings.register_profile("hf_amp", max_examples=examples, deadline=None, derandomize=True)
    settings.load_profile("hf_amp")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu` the files without such a test are not imported: they may need what a bare machine has not."""
    is_test = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    if config.getoption("-m") == "gpu" and is_test and "mark.gpu" not in collection_path.read_text(encoding="utf-8"):
        return True
    return None


@pytest.fixture
def full_size(request: pytest.FixtureRequest) -> bool:
    """Whether to do all of it."""
    return bool(request.config.getoption("--full-size"))


@pytest.fixture
def fresh_accelerator_state() -> Iterator[None]:
    """The test starts and ends without an Accelerator."""
    forget_accelerators()
    yield
    forget_accelerators()


@pytest.fixture
def nothing_compiled() -> None:
    """Whatever other tests of this process have compiled, no plan would be tried out after it."""
    import torch._dynamo.utils

    torch._dynamo.utils.counters.clear()
    torch.compiler.reset()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
