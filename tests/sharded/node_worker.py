"""A rank of two "nodes", started by `accelerate launch` on each: trains, saves, is killed once where that is asked for, and goes on."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

import hf_amp
from tests.rank_end import leave_together

STEPS, SAVED_AFTER, DIES_AFTER = 8, 3, 5


def main(folder: str, victim: int) -> None:
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    session = hf_amp.attach(accelerator, init_scale=2.0**18)
    torch.manual_seed(0)
    plain = torch.nn.Linear(8, 4)
    model, optimizer = accelerator.prepare(plain, torch.optim.SGD(plain.parameters(), lr=0.01))
    saved, begins = Path(folder, "saved"), 0
    if (
        saved.exists()
    ):  # a node that follows another's restart is told of none: TORCHELASTIC_RESTART_COUNT stays 0 there
        accelerator.load_state(str(saved))
        begins = session.scaler.decided_steps
    for number in range(begins, STEPS):
        torch.manual_seed(number)
        accelerator.backward(model(torch.randn(4, 8)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        if number + 1 == SAVED_AFTER:
            accelerator.save_state(str(saved))
        if number + 1 == DIES_AFTER and not begins and accelerator.process_index == victim:
            os.kill(os.getpid(), signal.SIGKILL)
    everyone = accelerator.gather(torch.stack([p.detach().double().sum() for p in model.parameters()]).sum()[None])
    found = {"weights": everyone.tolist(), "steps": session.scaler.decided_steps, "began_at": begins}
    if accelerator.is_main_process:
        print(
            json.dumps(found | {"skipped": session.scaler.skipped_steps, "scale": session.scaler.get_scale()}),
            flush=True,
        )
    leave_together()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
