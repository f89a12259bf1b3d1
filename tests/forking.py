"""Programs in processes of their own, as many as there are ranks, forked from one that has imported what they need.

Each would else import PyTorch and transformers anew, and the launcher too: 15 seconds of a CPU for two ranks. What a
launcher itself does is for `integrations/launching.py`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
PATIENCE = 1800
"""Seconds after which a rank is killed."""
_FORKING = multiprocessing.get_context("forkserver")
_FORKING.set_forkserver_preload(["tests.integrations.trainers"])


@dataclass(frozen=True)
class Ended:
    """How a program ended: the exit code of each rank, negative where a signal ended it, and what they printed."""

    codes: list[int]
    output: str


def run_program(module: str, *arguments: str, ranks: int = 1, **environment: str) -> Ended:
    """`python -m module arguments`, on several ranks with the variables that a launcher sets for them."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",  # they share the store of this process
    }  # fmt: skip
    with tempfile.NamedTemporaryFile() as output:
        started = []
        for rank in range(ranks):
            own = {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            process = _FORKING.Process(target=_program, args=(module, arguments, {**own, **environment}, output.name))
            process.start()
            started.append(process)
        for process in started:
            process.join(PATIENCE)
            process.kill()
            process.join()
        return Ended([process.exitcode for process in started], Path(output.name).read_text())


def printed_by(module: str, *arguments: str, ranks: int = 2, **environment: str) -> str:
    """What a program prints that has to end well."""
    ended = run_program(module, *arguments, ranks=ranks, **environment)
    assert ended.codes == [0] * ranks, ended.output[-4000:]
    return ended.output


def told_by_ranks(module: str, *arguments: str, **environment: str) -> list[Any]:
    """The line of JSON that rank 0 of two prints: what each of them has seen."""
    told = (
        line for line in printed_by(module, *arguments, **environment).splitlines() if line.startswith(("[{", "[["))
    )
    return list(json.loads(next(told)))


def _program(module: str, arguments: tuple[str, ...], environment: Mapping[str, str], output: str) -> None:
    os.environ.update(environment)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
