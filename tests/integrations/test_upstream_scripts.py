"""Accelerate's own test scripts pass with hf_amp attached to every Accelerator that they make.

`test_distributed_data_loop` and `test_ddp_comm_hook` are not among them: on a CPU they hang and fail without hf_amp too
(accelerate 1.15), because joining uneven inputs does nothing there and the latter passes device numbers.
"""

from __future__ import annotations

import pytest

from tests.integrations.launching import launch


@pytest.mark.parametrize(
    ("config", "accelerators"),
    [
        ("single_cpu_fp16.yaml", {"test_sync": 3}),
        ("cpu_2_processes.yaml", {"test_sync": 3, "test_script": 16}),
    ],
)
def test_upstream_scripts_pass(config: str, accelerators: dict[str, int]) -> None:
    """They end without an error, hf_amp was attached throughout, and it did decide optimizer steps."""
    output = launch(config, "--mixed_precision", "no", "-m", "tests.integrations.upstream_script", *accelerators)
    reported = dict(line.split(": attached to ") for line in output.splitlines() if ": attached to " in line)
    for script, least in accelerators.items():
        attached, steps = (int(word) for word in reported[script].split() if word.isdigit())
        assert attached >= least
        assert steps > 0
