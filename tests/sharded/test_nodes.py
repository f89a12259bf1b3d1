"""`accelerate_configs/multi_node_fp16.yaml`, started as on two machines, which are both this one: two launchers of two ranks each."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integrations.launching import CONFIGS, ROOT


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def test_two_nodes_train_one_model(tmp_path: Path, full_size: bool) -> None:
    """Four ranks on two nodes: same weights, skips, scale; one of them prints."""
    if not full_size:
        pytest.skip("two launchers: with --full-size")
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    address = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port()), "--num_processes", "4"]
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(CONFIGS / "multi_node_fp16.yaml"),
    ]
    program = ["-m", "tests.sharded.node_worker", str(tmp_path), "-1"]
    nodes = [
        subprocess.Popen(
            [*launch, *address, "--machine_rank", str(rank), *program],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        for rank in range(2)
    ]
    outputs = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    told = [json.loads(line) for output in outputs for line in output.splitlines() if line.startswith("{")]
    assert len(told) == 1
    assert told[0]["weights"] == [told[0]["weights"][0]] * 4
    assert (told[0]["steps"], told[0]["skipped"], told[0]["scale"]) == (8, 2, 2.0**16)
