"""Hooks on a parameter, which a replay leaves out: `torch.Tensor._backward_hooks`."""

from __future__ import annotations

import torch

from hf_amp.fallback.replay import hooks_silent


def test_hooks_on_a_parameter_are_silent_and_come_back() -> None:
    """Inside they do not run; afterwards they do, in `grad` and in `backward`, and their handles still remove them."""
    p, seen = torch.nn.Parameter(torch.ones(2)), []
    handle = p.register_hook(seen.append)
    with hooks_silent([p]):
        torch.autograd.grad((p * 2).sum(), p)
    assert seen == []
    torch.autograd.grad((p * 2).sum(), p)
    (p * 2).sum().backward()
    assert len(seen) == 2
    handle.remove()
    (p * 2).sum().backward()
    assert len(seen) == 2
