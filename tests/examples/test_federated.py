"""Federated averaging: what the example's clients and server do, and the example itself by Flower."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "federated_flower.py"


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    """The functions of the example."""
    return runpy.run_path(str(EXAMPLE))


def test_the_average_is_weighted_in_fp32_and_leaves_out_what_is_not_finite(example: dict[str, Any]) -> None:
    """Against a mean by hand; the client is named, whatever is not finite; without any finite one it is an error."""
    ones, threes = [np.full((2, 2), 1.0, np.float32)], [np.full((2, 2), 3.0, np.float16)]
    for bad in (np.nan, np.inf):
        broken = [np.array([[1.0, bad], [1.0, 1.0]], np.float32)]
        weights, left_out = example["average"]({"a": (ones, 300), "b": (broken, 5000), "c": (threes, 100)})
        assert left_out == ["b"]
        assert weights[0].dtype == np.float32
        assert np.array_equal(weights[0], np.full((2, 2), 1.5, np.float32))
    with pytest.raises(ValueError, match="no client's update is finite"):
        example["average"]({"b": (broken, 1)})


def test_a_round_of_three_precisions(example: dict[str, Any]) -> None:
    """The bad row costs a client with hf_amp a step, one without it its weights; the average of the others is better than before."""
    begun = example["weights_of"](example["initial_model"]())
    guarded = {name: example["train_round"](name, begun, 20) for name in example["PRECISIONS"]}
    assert all(figures["skipped"] >= 1 for _, figures in guarded.values())
    assert all(w.dtype == np.float32 for weights, _ in guarded.values() for w in weights)
    assert len({weights[0].tobytes() for weights, _ in guarded.values()}) == 3
    unguarded, _ = example["train_round"]("BF16", begun, 20, guarded=False)
    updates = {name: (weights, 500) for name, (weights, _) in guarded.items()} | {"BF16": (unguarded, 500)}
    weights, left_out = example["average"](updates)
    assert left_out == ["BF16"]
    assert example["accuracy"](weights) > 2 * example["accuracy"](begun)


@pytest.mark.skipif(find_spec("flwr") is None, reason="needs flwr, which the extra hf_amp[peers] brings")
def test_with_flower() -> None:
    """A server and three clients on the loopback: two rounds, the unguarded client is named in each."""
    line = [sys.executable, str(EXAMPLE), "--rounds", "2", "--steps", "20", "--unguarded", "BF16"]
    shown = subprocess.run(line, capture_output=True, text=True, check=True, timeout=300).stdout
    found = re.findall(r"^round (\d): ([\d.]+)% .*left out, not finite: (.*)$", shown, re.MULTILINE)
    assert [(number, client) for number, _, client in found] == [("1", "BF16"), ("2", "BF16")]
    assert float(found[1][1]) > 20
