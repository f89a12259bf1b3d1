"""`accelerate_configs/multi_node_fp16.yaml`, started as on two machines, which are both this one: two launchers of two ranks each."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.launching import CONFIGS, ROOT


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def launched(folder: Path, victim: int, *options: str, **variables: str) -> list[dict[str, Any]]:
    """What two launchers of two ranks each print as JSON, once both have ended well. `victim`: a rank that is killed once, or -1."""
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        **variables,
    }
    port = free_port()
    address = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port), "--num_processes", "4"]
    config = ["--config_file", str(CONFIGS / "multi_node_fp16.yaml")]
    program = ["-m", "tests.sharded.node_worker", str(folder), str(victim)]
    nodes: list[subprocess.Popen[str]] = []
    for rank in range(2):
        launch = [
            "-m",
            "accelerate.commands.launch",
            *config,
            *address,
            *options,
            "--machine_rank",
            str(rank),
            *program,
        ]
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        nodes.append(subprocess.Popen([sys.executable, *launch], cwd=ROOT, env=environment, **streams))
        while (
            not rank and nodes[0].poll() is None and not listens(port)
        ):  # both have the address that the first is to listen at
            time.sleep(0.2)
    outputs = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    return [json.loads(line) for output in outputs for line in output.splitlines() if line.startswith("{")]


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    if not request.config.getoption("--full-size"):
        pytest.skip("two launchers: with --full-size")
    return launched(tmp_path_factory.mktemp("nodes"), -1)


def test_two_nodes_train_one_model(uninterrupted: list[dict[str, Any]]) -> None:
    """Four ranks on two nodes: same weights, skips, scale; one of them prints."""
    (told,) = uninterrupted
    assert told["weights"] == [told["weights"][0]] * 4
    assert (told["steps"], told["skipped"], told["scale"]) == (8, 2, 2.0**16)


def test_a_killed_rank_is_restarted_and_all_go_on(uninterrupted: list[dict[str, Any]], tmp_path: Path) -> None:
    """With a rendezvous that begins anew: all four come up again, and go on from the checkpoint, to the last bit as if nothing had been.

    With the default "static", or without the variable, stock's new workers read the addresses of the old ones, and never join.
    """
    options = ("--rdzv_backend", "c10d", "--max_restarts", "1")
    (told,) = launched(tmp_path, 3, *options, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    assert told.pop("began_at") == 3
    assert uninterrupted[0] == told | {"began_at": 0}
