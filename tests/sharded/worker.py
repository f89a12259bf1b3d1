"""One of several ranks that train what FSDP2 has sharded. Prints a JSON line with what all of them have seen, run by run."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy

from tests.rank_end import leave_together
from tests.sharded import runs
from tests.sharded.trainer import by_trainer

SECONDS = 120
"""After which a rank that waits in vain is ended."""
HALF = MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=torch.float32)
FAULTS = ("none", "activation", "root", "division", "NaN batch", "raises", "leaves out")
LONG = 40
"""Steps of a run in full size."""
RESHARDS = {"GPT-2": True, "Llama": False, "T5": True}
"""Whether units let go of their parameters after forward."""

Run = Callable[[], Any]


def models(steps: int) -> dict[str, Run]:
    found: dict[str, Run] = {}
    for name, reshard in RESHARDS.items():
        options = {"reshard_after_forward": reshard}
        found[f"{name}, FP16"] = lambda name=name, options=options: runs.raw(name, steps, "MIXED", **options)
        found[f"{name}, FP32"] = lambda name=name: runs.raw(name, steps, "FP32", leaves_out_first=True)
        found[f"{name}, whole"] = lambda name=name: runs.raw(name, 2, "MIXED", shards=False)
        if steps >= LONG:
            found[f"{name}, retried"] = lambda name=name: runs.retried(name, steps)
            found[f"{name}, FP32 of all batches"] = lambda name=name: runs.raw(name, steps, "FP32")
        found[f"{name}, stock"] = lambda name=name: runs.stock(name, 3)
    return found


def accelerated(steps: int) -> dict[str, Run]:
    found: dict[str, Run] = {}
    for name in RESHARDS if steps >= LONG else ("GPT-2",):
        found[f"{name}, fp16"] = lambda name=name: runs.accelerated(name, steps, "fp16")
        found[f"{name}, no"] = lambda name=name: runs.accelerated(name, steps, "no", leaves_out_first=True)
    return {
        **found,
        "attached late": lambda: runs.accelerated("GPT-2", 2, "fp16", first=True),
        "BF16 head": lambda: runs.chosen("accelerate BF16"),
        "BF16 by default": runs.rounding,
        "BF16 with a choice": lambda: runs.rounding(fp32_modules=["0"]),
    }


def faults(folder: str) -> dict[str, Run]:
    return {
        "logged": lambda: runs.logged(folder),
        **{fault: lambda fault=fault: runs.one_fault(fault) for fault in FAULTS},
        "FP16 head": lambda: runs.chosen("raw"),
        "half policy": lambda: runs.raw("GPT-2", 2, "MIXED", mp_policy=HALF),
        "actor": runs.actor_and_reference,
        **{f"calls, {who}": lambda who=who: runs.calls_a_boundary(who == "hf_amp") for who in ("stock", "hf_amp")},
        **{
            f"collectives, {who}, {how}": lambda who=who, how=how: runs.collectives_a_step(
                who == "hf_amp", how == "clips"
            )
            for who in ("stock", "hf_amp")
            for how in ("clips", "does not")
        },
    }


def axes() -> dict[str, Run]:
    faults = ("none", "activation", "NaN batch", "loss")
    by_hand = [(kind, fault) for kind in ("HSDP", "TP") for fault in faults] + [("TP", "one part")]
    return {
        **{f"{kind}, {fault}": lambda kind=kind, fault=fault: runs.on_two_axes(kind, fault) for kind, fault in by_hand},
        # accelerate 1.15's FSDP with tensor parallel imports what transformers 5.23 does not have
        **{
            f"accelerate's HSDP, {fault}": lambda fault=fault: runs.on_two_axes("HSDP", fault, by_accelerate=True)
            for fault in faults
        },
    }


def storm(steps: int, seed: int) -> dict[str, Run]:
    def note(number: int) -> None:
        if number % 10 == 0:
            faulthandler.dump_traceback_later(SECONDS, exit=True)

    return {"storm": lambda: runs.meet_faults(steps, seed, note)}


def main(what: str, *arguments: str) -> None:
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **alone)
    chosen: dict[str, Run] = {}
    if what == "models":
        chosen = models(int(arguments[0]))
    elif what == "accelerate":
        chosen = accelerated(int(arguments[0]))
    elif what == "trainer":
        chosen = {kind: lambda kind=kind: by_trainer(kind, arguments[0]) for kind in ("fp16", "resumed")}
    elif what == "faults":
        chosen = faults(arguments[0])
    elif what == "kinds":
        chosen = {kind: lambda kind=kind: runs.one_of_many(kind) for kind in arguments}
    elif what == "killed":
        chosen = {how: lambda how=how: runs.killed_and_resumed(arguments[0], how) for how in arguments[1:]}
    elif what == "dies":
        chosen = {"dies": lambda: runs.one_fault("dies")}
    elif what == "axes":
        chosen = axes()
    elif what == "storm":
        chosen = storm(int(arguments[0]), int(arguments[1]))
    elif what == "saves":
        chosen = {"run": lambda: runs.save_and_go_on(arguments[0], resumes=False)}
    elif what == "resumes":
        chosen = {"run": lambda: runs.save_and_go_on(arguments[0], resumes=True)}
    results = {}
    for name, run in chosen.items():
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        began = time.monotonic()
        results[name] = run()
        print(f"{name}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, results)
    if dist.get_rank() == 0:
        print(json.dumps(gathered))
    leave_together()


if __name__ == "__main__":
    main(*sys.argv[1:])
