"""What either works on a GPU or does not: a model that runs as a CUDA graph, models compiled.

`python -m tests.benchmarks.gpu.tries cuda` prints a line of JSON for each, as soon as it is known.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from torch import nn

from hf_amp import AmpSession
from tests.benchmarks.gpu.contenders import accelerated
from tests.benchmarks.gpu.models import SHALLOW, TINY, Subject

COMPILED_STEPS = 3


def try_graphed_model(device: torch.device) -> dict[str, Any]:
    """A model whose forward and backward run as CUDA graphs, captured before hf_amp is attached, and a fused optimizer.

    The step boundary itself reads the host, or waits for the step before, and can be in no graph.

    Returns:
        `captured`, and where it is: whether steps move parameters, and whether one on overflowing gradients is skipped. Otherwise
        the error.
    """
    torch.manual_seed(0)
    x = torch.randn(64, 256, device=device)
    model: Any = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256)).to(device)
    try:
        with torch.autocast(device.type, torch.float16, cache_enabled=False):
            graphed = torch.cuda.make_graphed_callables(model, (x,))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        session = AmpSession.for_model(graphed, optimizer, init_scale=1024.0)
        moved = []
        for factor in (1.0, torch.inf, 1.0):
            before = model[0].weight.detach().clone()
            session.scaler.scale(graphed(x).float().square().mean() * factor).backward()
            session.scaler.step(optimizer)
            session.scaler.update()
            optimizer.zero_grad()
            moved.append(not torch.equal(before, model[0].weight.detach()))
        return {"captured": True, "moved": moved, "skipped_steps": session.scaler.skipped_steps}
    except Exception as error:
        return {"captured": False, "error": first_cause(error)}


def first_cause(error: BaseException) -> str:
    """The error that led to `error`: ending a capture that has failed raises another one."""
    while error.__context__ is not None:
        error = error.__context__
    return _told(error)


def _told(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def try_compiled(subject: Subject, device: torch.device, backend: str) -> dict[str, Any]:
    """Trains `subject`, compiled, for a few steps in FP16 with PERFORMANCE_OPTIMIZED."""
    torch.manual_seed(0)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    started = time.perf_counter()
    try:
        model = subject.make().to(device)
        batch = {name: x.to(device) for name, x in subject.batch(subject.rows[0]).items()}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        way = accelerated(torch.compile(model, backend=backend), optimizer, "PERFORMANCE_OPTIMIZED")
        losses = []
        for _ in range(COMPILED_STEPS):
            loss = way.forward(batch)
            losses.append(loss.detach())
            way.finish(loss)
        way.session.scaler.flush()
        return {
            "runs": bool(torch.stack(losses).isfinite().all()),
            "losses": [round(loss.item(), 4) for loss in losses],
            "applied_steps": way.session.scaler.applied_steps,
            "compiled_graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
            "graph_breaks": sum(torch._dynamo.utils.counters["graph_break"].values()),
            "seconds": round(time.perf_counter() - started, 1),
        }
    except Exception as error:
        return {"runs": False, "error": _told(error)}


def main() -> None:
    command = argparse.ArgumentParser(description=__doc__)
    command.add_argument("device", type=torch.device)
    command.add_argument("--tiny", action="store_true", help="nothing is compiled")
    options = command.parse_args()
    print(json.dumps({"graphed model": try_graphed_model(options.device)}), flush=True)
    for subject in TINY[:1] if options.tiny else SHALLOW[:2]:
        tried = try_compiled(subject, options.device, "eager" if options.tiny else "inductor")
        print(json.dumps({f"compiled {subject.name}": tried}), flush=True)


if __name__ == "__main__":
    main()
