"""What either works on a GPU or does not: the step boundary of PERFORMANCE_OPTIMIZED in a CUDA graph, models compiled."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from hf_amp import AdvancedGradScaler, MixedPrecisionConfig
from tests.benchmarks.gpu.contenders import MAX_NORM, accelerated
from tests.benchmarks.gpu.models import Subject

COMPILED_STEPS = 3
CAPTURE_MODES = ("global", "thread_local", "relaxed")
"""What else the process may ask of the device while a graph is captured. Source: `cudaStreamCaptureMode`."""


def try_cuda_graph(mode: str, device: torch.device) -> dict[str, Any]:
    """Captures clip, step and update on gradients that stay where they are, and replays them.

    Returns:
        `captured`, and where it is: whether a replay moves parameters, whether one on overflowing gradients leaves
        them alone, and whether two of those lower the scale twice. Otherwise the error.
    """
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(512, 512, device=device))
    weight.grad = torch.randn_like(weight)
    loss = torch.ones((), device=device)
    scaler = AdvancedGradScaler(MixedPrecisionConfig(scaling_strategy="PERFORMANCE_OPTIMIZED"), device)
    optimizer = torch.optim.AdamW([weight], lr=1e-3, fused=True, capturable=True)

    def record() -> None:
        scaler.scale(loss)
        scaler.clip_grad_norm_(optimizer, MAX_NORM)
        scaler.step(optimizer)
        scaler.update()

    try:
        # Source: PyTorch documentation, "CUDA semantics", CUDA graphs: warm up on a side stream, then capture.
        beside = torch.cuda.Stream(device)
        beside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(beside):
            for _ in range(3):
                record()
        torch.cuda.current_stream(device).wait_stream(beside)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode=mode):
            record()

        def moves() -> bool:
            before = weight.detach().clone()
            graph.replay()
            return not torch.equal(before, weight.detach())

        moved = moves()
        weight.grad.fill_(torch.inf)
        left_alone = not moves()
        once = scaler.get_scale()
        graph.replay()
        return {
            "captured": True,
            "a replay moves parameters": moved,
            "overflowing gradients move none": left_alone,
            "a second overflow lowers the scale again": scaler.get_scale() < once,
        }
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
