"""Accelerate's own test scripts pass with hf_amp attached to every Accelerator that they make.

`test_distributed_data_loop` and `test_ddp_comm_hook` are not among them: on a CPU they hang and fail without hf_amp too
(accelerate 1.15), because joining uneven inputs does nothing there and the latter passes device numbers.
"""

from __future__ import annotations

from tests.each import for_each
from tests.forking import printed_by


@for_each(("ranks", "script", "accelerators"), [(1, "test_sync", 3), (2, "test_sync", 3), (2, "test_script", 16)])
def test_an_upstream_script_passes(ranks: int, script: str, accelerators: int) -> None:
    """It ends without an error, hf_amp was attached throughout, and it did decide optimizer steps.

    One process group a process: gloo now and then waits for ever in the second one.
    """
    output = printed_by("tests.integrations.upstream_script", script, ranks=ranks, ACCELERATE_USE_CPU="true")
    (reported,) = (line for line in output.splitlines() if line.startswith("attached to"))
    attached, steps = (int(word) for word in reported.split() if word.isdigit())
    assert attached >= accelerators
    assert steps > 0
