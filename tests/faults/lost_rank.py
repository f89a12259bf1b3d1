"""One of two ranks dies by SIGKILL: in a step, or in the middle of a save. The other tells how it ended."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tests.integrations.checkpointed_run import begin
from tests.reference import snapshot

SAVED_AFTER, LIVES_ON_FOR = 4, 3
"""Steps before the checkpoint, and after it before a rank dies."""


class Rank1DiesSecondTime:
    """An object that is saved last, after whose first save rank 1 is not to be trusted."""

    def __init__(self, rank: int) -> None:
        self.rank, self.saves = rank, 0

    def state_dict(self) -> dict[str, Any]:
        self.saves += 1
        if self.saves == 2 and self.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def main(folder: str, where: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # rank 0 is to end by itself, before the launcher ends it
    run = begin()
    rank = run.accelerator.process_index
    run.accelerator.register_for_checkpointing(Rank1DiesSecondTime(rank))
    run.train(0, SAVED_AFTER)
    run.accelerator.save_state(f"{folder}/saved")
    if rank == 0:
        torch.save(snapshot(run.model, run.optimizer), f"{folder}/saved.pt")
    run.train(SAVED_AFTER, SAVED_AFTER + LIVES_ON_FOR)
    run.accelerator.wait_for_everyone()
    if where == "step" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    try:
        if where == "save":
            run.accelerator.save_state(f"{folder}/saved")
        run.train(SAVED_AFTER + LIVES_ON_FOR, 100)
    except Exception as error:
        reported = {
            "error": f"{type(error).__name__}: {error}",
            "seconds": time.monotonic() - started,
            "finite": all(bool(p.isfinite().all()) for p in run.model.parameters()),
        }
        Path(folder, "survivor.json").write_text(json.dumps(reported))
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise


if __name__ == "__main__":
    main(*sys.argv[1:])
