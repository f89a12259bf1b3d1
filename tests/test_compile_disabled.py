"""Hooks that compiled code does not trace into."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_amp.patch_log import compile_disabled


@pytest.mark.parametrize("called_before", [False, True])
def test_compiled_code_runs_it_as_it_stands(called_before: bool) -> None:
    """Whether its first call is the one that the compiler meets or not, it runs outside of the graph, at every call."""
    traced = []

    @compile_disabled
    def note(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        traced.append(torch.compiler.is_compiling())
        return output + 1

    torch.compiler.reset()
    model, x = nn.Linear(2, 2), torch.ones(1, 2)
    expected = model(x) + 1
    model.register_forward_hook(note)
    if called_before:
        model(x)
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        assert torch.equal(compiled(x), expected)
    torch.compiler.reset()
    assert traced == [False] * (3 if called_before else 2)
