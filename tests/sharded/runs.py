"""Models that FSDP2 shards over the ranks of a test, and loops over them."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin, ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

import hf_amp
from hf_amp import AmpSession, EventKind, MixedPrecisionConfig, StandardMixedPrecisionTrainer
from tests.fallback.rescaled import ZOO, RescaledModel

CASES = {case.name: case for case in ZOO}
BLOCKS = {"GPT-2": "GPT2Block", "Llama": "LlamaDecoderLayer", "T5": "T5Block"}


def sharded(model: nn.Module, block: str, mesh: DeviceMesh | None = None, **options: Any) -> nn.Module:
    """`model`, each module of the class called `block` a unit of its own, over all ranks."""
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for module in [m for m in model.modules() if type(m).__name__ == block]:
        fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def part_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's rows."""
    return {name: x.chunk(dist.get_world_size())[dist.get_rank()] for name, x in batch.items()}


def mean_over_ranks(loss: Tensor) -> float:
    mean = loss.detach().float().clone()
    dist.all_reduce(mean)
    return float(mean) / dist.get_world_size()


def told(session: AmpSession) -> dict[str, Any]:
    """What the session has said and done; all of it the same on all ranks, but for the messages."""
    kinds = (EventKind.STEP_SKIPPED, EventKind.PRECISION_CHANGED)
    seen = [e for e in session.events if e.kind in kinds]
    counts = {name: value for name, value in session.metrics().items() if "steps" in name}
    return {
        "decided": {
            "events": [[e.step, e.kind.value, e.cause and e.cause.value, list(e.modules)] for e in seen],
            "plan": session.plan.to_plain(),
            "scale": session.scaler.get_scale(),
            "counts": counts,
        },
        "skips": [e.step for e in seen if e.kind is EventKind.STEP_SKIPPED],
        "messages": [e.message for e in seen],
        "setup": [e.message for e in session.events if e.kind is EventKind.SETUP],
        "norm": session.metrics().get("grad_norm"),
    }


def step(session: AmpSession, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    session.scaler.scale(loss).backward()
    session.scaler.step(optimizer)
    session.scaler.update()
    optimizer.zero_grad()


def raw(
    name: str, steps: int, mode: str, shards: bool = True, leaves_out_first: bool = False, **options: Any
) -> dict[str, Any]:
    """A loop of `AmpSession.for_model`; without shards every rank trains the whole model on the whole batch.

    `leaves_out_first`: of the optimizer's steps, as where it was skipped.
    """
    case: RescaledModel = CASES[name]
    model, batches, make_optimizer = case.build(seed=0)
    if shards:
        sharded(model, BLOCKS[name], **options)
    optimizer = make_optimizer(model)
    session = AmpSession.for_model(model, optimizer, precision_mode=mode, init_scale=1024.0)
    losses = []
    for number in range(steps):
        batch = next(batches)
        loss = model(**(part_of(batch) if shards else batch)).loss
        if not (leaves_out_first and number == 0):
            step(session, optimizer, loss)
        losses.append(mean_over_ranks(loss))
    found = {**told(session), "losses": losses}
    session.detach()
    return found


def retried(name: str, steps: int) -> dict[str, Any]:
    """As `raw`, by a trainer of hf_amp's that runs the batch of a skipped step again: all ranks do, for all know of the skip."""
    model, batches, make_optimizer = CASES[name].build(seed=0)
    sharded(model, BLOCKS[name])
    optimizer = make_optimizer(model)
    trainer = StandardMixedPrecisionTrainer(MixedPrecisionConfig(init_scale=1024.0), on_overflow="retry")
    losses, retries = [], 0
    for _ in range(steps):
        result = trainer.train_step(part_of(next(batches)), model, optimizer)
        losses.append(mean_over_ranks(result["loss"]))
        retries += result["retries"]
    found = {**told(trainer.session), "losses": losses, "retries": retries}
    trainer.session.detach()
    return found


def accelerator_of_fsdp2(mode: str, block: str) -> Accelerator:
    """An Accelerator whose FSDP2 path runs on a CPU: accelerate makes one for accelerators alone, of the same parts."""
    AcceleratorState._reset_state(reset_partial_state=False)
    accelerator = Accelerator(mixed_precision=mode, cpu=True)
    as_fsdp2(accelerator.state, mode, block)
    return accelerator


def as_fsdp2(state: AcceleratorState, mode: str, block: str) -> None:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[block],
        reshard_after_forward=True,
        state_dict_type="SHARDED_STATE_DICT",
    )
    if mode != "no":
        plugin.set_mixed_precision(mode)
    state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin


def accelerated(
    name: str, steps: int, mode: str, first: bool = False, leaves_out_first: bool = False
) -> dict[str, Any]:
    """An Accelerate loop that clips; `first`: attached after `prepare`; `leaves_out_first`: as of `raw`."""
    model, batches, make_optimizer = CASES[name].build(seed=0)
    accelerator = accelerator_of_fsdp2(mode, BLOCKS[name])
    if name == "T5":  # else accelerate puts the shared weight into two groups, which torch refuses
        model.encoder.embed_tokens = model.decoder.embed_tokens = model.shared
    optimizer = make_optimizer(model)
    if first:
        model, optimizer = accelerator.prepare(model, optimizer)
    session = hf_amp.attach(accelerator, init_scale=1024.0)
    if not first:
        model, optimizer = accelerator.prepare(model, optimizer)
    losses, norms, skips = [], [], 0
    for number in range(steps):
        loss = model(**part_of(next(batches))).loss
        losses.append(mean_over_ranks(loss))
        if leaves_out_first and number == 0:
            continue
        accelerator.backward(loss)
        norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 1e6)))
        optimizer.step()
        skips += optimizer.step_was_skipped
        optimizer.zero_grad()
    found = {**told(session), "losses": losses, "norms": norms, "skipped": skips}
    session.detach()
    return found


def stock(name: str, steps: int) -> dict[str, Any]:
    """The same loop as `raw` with `torch.amp.GradScaler`: how many steps moved a parameter, and the scale at the end."""
    model, batches, make_optimizer = CASES[name].build(seed=0)
    sharded(model, BLOCKS[name])
    optimizer = make_optimizer(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    moved = 0
    for _ in range(steps):
        before = [p.to_local().clone() for p in model.parameters()]
        with hf_amp.emulate(torch.float16):
            loss = model(**part_of(next(batches))).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved += any(not torch.equal(a, p.to_local()) for a, p in zip(before, model.parameters(), strict=True))
    return {"moved": moved, "scale": scaler.get_scale()}


class Layer(nn.Linear):
    """Its output is multiplied by `gain`."""

    gain = 1.0

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if self.gain == 1.0 else x * self.gain


class Layers(nn.Module):
    """Four layers of width 16 and a loss, with a fault of this rank that is switched on from outside.

    Faults: "activation" (the output of the second layer is beyond FP16's range), "root" (the derivative of a root at zero), "division",
    "loss"; in a replay alone "raises", "leaves out" (a layer, which is a unit) and "dies".
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(16, 16) for _ in range(4))
        self.fault = "none"
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        repeated = any(x is former for former in self.seen)
        self.seen = [x]
        for index, layer in enumerate(self.layers):
            if repeated and index == 2 and self.fault == "raises":
                raise MemoryError("nothing is left")
            if repeated and index == 2 and self.fault == "leaves out":
                continue
            if repeated and index == 2 and self.fault == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            layer.gain = 1e6 if self.fault == "activation" and index == 1 else 1.0
            x = nn.functional.softsign(layer(x))
        if self.fault == "root":
            x = x + (x - x.detach()).abs().sqrt()
        if self.fault == "division":
            x = x * ((x - x) / (x - x))
        if self.fault in ("loss", "raises", "leaves out", "dies"):
            x = x * torch.inf
        return x.square().mean()


def layers(reshard: bool = True) -> Layers:
    torch.manual_seed(0)
    model = Layers()
    sharded(model, "Layer", reshard_after_forward=reshard)
    return model


def faults_of(seed: int, steps: int) -> Iterator[tuple[str, int]]:
    """(fault, rank that has it) of each step; mostly none, and of all kinds."""
    kinds = ("activation", "root", "division", "loss", "raises", "leaves out", "NaN batch", "large")
    drawn = torch.Generator().manual_seed(seed)

    def draw(most: int) -> int:
        return int(torch.randint(most, (), generator=drawn))

    for _ in range(steps):
        yield (kinds[draw(len(kinds))] if draw(4) == 0 else "none"), draw(dist.get_world_size())


def meet_faults(steps: int, seed: int = 0, note: Callable[[int], None] = lambda step: None) -> dict[str, Any]:
    """A run in which random ranks meet random faults: what it came to, and how often the ranks differed in anything they decide."""
    model = layers(reshard=bool(seed % 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    session = AmpSession.for_model(model, optimizer, init_scale=1024.0, recovery_steps=5)
    differ, met = 0, dict[str, int]()
    for number, (fault, rank) in enumerate(faults_of(seed, steps)):
        note(number)
        here = rank == dist.get_rank()
        model.fault = fault if here else "none"
        met[fault] = met.get(fault, 0) + 1
        torch.manual_seed(1000 * number + dist.get_rank())
        x = torch.randn(3, 16)
        x = x * torch.nan if here and fault == "NaN batch" else x
        loss = model(x) * (1e7 if fault == "large" else 1.0)
        step(session, optimizer, loss)
        if number % 10 == 9 or number + 1 == steps:
            differ += not same_on_all_ranks(told(session)["decided"])
    whole = [p.full_tensor() for p in model.parameters()]
    found = {**told(session), "differ": differ, "met": met, "finite": all(bool(p.isfinite().all()) for p in whole)}
    found["weights"] = [p.double().sum().item() for p in whole]
    session.detach()
    return found


def same_on_all_ranks(value: Any) -> bool:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return all(other == everyone[0] for other in everyone)


def save_and_go_on(folder: str, resumes: bool) -> dict[str, Any]:
    """Trains, saves with `torch.distributed.checkpoint`, and trains on; or resumes from what other ranks have saved, as many as there are.

    Every rank has the same batches, so that the number of ranks is no part of the computation.
    """
    model = layers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    session = AmpSession.for_model(model, optimizer, init_scale=1024.0)
    drawn = torch.Generator().manual_seed(0)
    batches = [torch.randn(4, 16, generator=drawn) for _ in range(12)]
    if not resumes:
        for number, x in enumerate(batches[:6]):
            model.fault = "activation" if number == 1 else "loss" if number == 3 else "none"
            step(session, optimizer, model(x))
    state = {
        "amp": json.dumps(session.state_dict())
    }  # one string: of a nested plan only the names that are known would be loaded
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state |= {"model": model_state, "optimizer": optimizer_state}
    if resumes:
        checkpoint.load(state, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        session.load_state_dict(json.loads(state["amp"]))
    else:
        checkpoint.save(state, checkpoint_id=folder)
    saved = {key: told(session)["decided"][key] for key in ("plan", "scale", "counts")}
    model.fault = "none"
    losses = []
    for x in batches[6:]:
        loss = model(x)
        losses.append(loss.item())
        step(session, optimizer, loss)
    after = {key: told(session)["decided"][key] for key in ("plan", "scale", "counts")}
    session.detach()
    return {"saved": saved, "losses": losses, "after": after}


def killed_and_resumed(folder: str, how: str, steps: int = 10) -> dict[str, Any]:
    """A run that saves every third step: "whole", "killed" (rank 1, in backward of the sixth step) or "resumed" from the newest save."""
    model = layers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    session = AmpSession.for_model(model, optimizer, init_scale=1024.0, growth_interval=3, recovery_steps=4)
    begins = 0
    if how == "resumed":
        begins = max(int(name) for name in os.listdir(folder) if name.isdigit())
        state = _state_of(session, model, optimizer)
        checkpoint.load(state, checkpoint_id=f"{folder}/{begins}")
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        session.load_state_dict(json.loads(state["amp"]))
    for number in range(begins + 1, steps + 1):
        torch.manual_seed(10 * number + dist.get_rank())
        model.fault = {2: "activation", 5: "loss", 8: "activation"}.get(number, "none") if dist.get_rank() else "none"
        loss = model(torch.randn(4, 16))
        if how == "killed" and number == 6 and dist.get_rank() == 1:
            loss.register_hook(lambda gradient: os.kill(os.getpid(), signal.SIGKILL))
        step(session, optimizer, loss)
        if number % 3 == 0 and how != "resumed":
            checkpoint.save(_state_of(session, model, optimizer), checkpoint_id=f"{folder}/{number}")
    decided = told(session)["decided"]
    found = {"begins": begins, **{key: decided[key] for key in ("plan", "scale", "counts")}}
    found["weights"] = [x for p in model.parameters() for x in p.full_tensor().reshape(-1).tolist()]
    moments = [x for _, its in sorted(get_state_dict(model, optimizer)[1]["state"].items()) for x in its.values()]
    found["moments"] = [
        v for x in moments for v in (x.full_tensor() if hasattr(x, "full_tensor") else x).reshape(-1).tolist()
    ]
    session.detach()
    return found


def _state_of(session: AmpSession, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"amp": json.dumps(session.state_dict()), "model": model_state, "optimizer": optimizer_state}


class _Collectives(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "to_local") for kind in types):
            return NotImplemented
        if "c10d" in func.namespace and not {"wait", "wrap"} & set(func.__name__.split("_")):
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


def collectives_a_step(hf_amp_too: bool, clips: bool) -> list[str]:
    """The collectives of one healthy step, its forward and backward pass too, under stock's scaler or hf_amp's."""
    model = layers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    session = AmpSession.for_model(model, optimizer, init_scale=1024.0) if hf_amp_too else None
    scaler = session.scaler if session else torch.amp.GradScaler("cpu", init_scale=1024.0)
    for number in range(4):
        with _Collectives() as counted:
            scaler.scale(model(torch.randn(3, 16))).backward()
            if clips and session:
                session.scaler.clip_grad_norm_(optimizer, 1.0)
            elif clips:
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                norm.full_tensor()
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        if number == 3 and session:
            session.detach()
    return counted.seen


def calls_a_boundary(hf_amp_too: bool) -> int:
    """Functions, of Python and of C, that the boundary of one step of 200 DTensors calls under stock's scaler or hf_amp's."""
    model = fully_shard(nn.Sequential(*(nn.Linear(4, 4) for _ in range(100))))
    optimizer, calls = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True), list[str]()
    session = AmpSession.for_model(model, optimizer, init_scale=1024.0) if hf_amp_too else None
    scaler = session.scaler if session else torch.amp.GradScaler("cpu", init_scale=1024.0)
    for number in range(4):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        scaler.scale(torch.ones(()))
        sys.setprofile((lambda frame, event, _: calls.append(event)) if number == 3 else None)
        scaler.step(optimizer)
        scaler.update()
        sys.setprofile(None)
    if session:
        session.detach()
    return calls.count("call") + calls.count("c_call")


def one_fault(fault: str, steps: int = 4, at: int = 2, which: int = 1, **options: Any) -> dict[str, Any]:
    """A few steps, in one of which the second rank alone has `fault`."""
    model = layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    session = AmpSession.for_model(model, optimizer, init_scale=64.0, **options)
    seconds = 0.0
    for number in range(1, steps + 1):
        here = number == at and dist.get_rank() == which
        model.fault = fault if here else "none"
        torch.manual_seed(number)
        loss = model(torch.randn(3, 16) * (torch.nan if here and fault == "NaN batch" else 1.0))
        began = time.monotonic()
        step(session, optimizer, loss)
        seconds = max(seconds, time.monotonic() - began)
        left = [name for name, p in model.named_parameters() if not hasattr(p, "to_local") or p.grad is not None]
    found = {**told(session), "seconds": seconds, "left": left}
    found["weights"] = [p.full_tensor().double().sum().item() for p in model.parameters()]
    session.detach()
    return found


def logged(folder: str) -> dict[str, Any]:
    """Every rank of a raw loop opens the log and writes figures; the second has a fault. Who has written what, on the console and there."""
    model, lines = layers(), list[str]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    logger = logging.getLogger("hf_amp")
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    logging.disable(logging.NOTSET)
    try:
        with AmpSession.for_model(model, optimizer, init_scale=1024.0) as session:
            session.log_to(folder)
            for number in range(3):
                model.fault = "activation" if number == 1 and dist.get_rank() else "none"
                loss = model(torch.randn(4, 16))
                step(session, optimizer, loss)
                session.log_metrics(loss=loss)
        dist.barrier()
    finally:
        logging.disable(logging.CRITICAL)
        logger.removeHandler(handler)
    written = [json.loads(line) for path in Path(folder).glob("*.jsonl") for line in path.read_text().splitlines()]
    return {
        "lines": lines,
        "runs": len({line["run_id"] for line in written}),
        "written": [line["event"] for line in written],
    }


def chosen(by: str) -> dict[str, Any]:
    """A run with modules in FP32 by choice: in which precision the head runs."""
    options: dict[str, Any] = {"fp32_modules": ["lm_head"]}
    dtypes: list[str] = []

    def look(module: nn.Module, arguments: Any, output: Tensor) -> None:
        dtypes.append(f"{module.weight.dtype} {output.dtype}".replace("torch.", ""))

    model, batches, _ = CASES["Llama"].plain(seed=0), CASES["Llama"].batches(0), None
    if by == "accelerate BF16":
        accelerator = accelerator_of_fsdp2("bf16", BLOCKS["Llama"])
        session = hf_amp.attach(accelerator, **options)
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
        backward = accelerator.backward
    else:
        sharded(model, BLOCKS["Llama"])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        session = AmpSession.for_model(model, optimizer, init_scale=64.0, **options)
        backward = None
    handle = model.lm_head.register_forward_hook(look, prepend=True)
    for _ in range(2):
        loss = model(**part_of(next(batches))).loss
        if backward:
            backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        else:
            step(session, optimizer, loss)
    handle.remove()
    found = {**told(session), "head": sorted(set(dtypes)), "applied": session.metrics()["applied_steps"]}
    session.detach()
    return found


class Angle(nn.Module):
    """The mean angle of directions with themselves: where rounding makes a cosine greater than one, NaN."""

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.normalize(x, dim=-1)
        return torch.acos((x * x).sum(-1) * 0.999).square().mean()


def rounding(**options: Any) -> dict[str, Any]:
    """BF16 under accelerate's own FSDP2, of a model that only rounding keeps from training."""
    torch.manual_seed(0)
    accelerator = accelerator_of_fsdp2("bf16", "Layer")
    session = hf_amp.attach(accelerator, **options)
    model = nn.Sequential(Layer(16, 16), nn.Tanh(), Layer(16, 16), Angle())
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    for number in range(4):
        torch.manual_seed(10 * number + dist.get_rank())
        accelerator.backward(model(torch.randn(64, 16)))
        optimizer.step()
        optimizer.zero_grad()
    attached = next(e.message for e in session.events if e.kind is EventKind.ATTACHED)
    found = {**told(session), "attached": attached, "applied": session.metrics()["applied_steps"]}
    session.detach()
    return found


def actor_and_reference(steps: int = 6, parts: int = 2) -> dict[str, Any]:
    """A policy update as verl makes it: a sharded actor, a sharded reference that is not trained, micro-batches, clipping.

    The actor leaves FP16's range in known modules; the reference is the same model in FP32.
    """
    case = CASES["Llama"]
    actor, batches, make_optimizer = case.build(seed=0)
    reference = case.plain(seed=0).eval()
    for model in (actor, reference):
        sharded(model, BLOCKS["Llama"])
    optimizer = make_optimizer(actor)
    session = AmpSession.for_model(actor, optimizer, init_scale=1024.0)
    losses, divergences = [], []
    for _ in range(steps):
        whole = part_of(next(batches))
        for part in range(parts):
            inputs = {name: x.chunk(parts)[part] for name, x in whole.items() if name != "labels"}
            with torch.no_grad():
                before = reference(**inputs).logits.log_softmax(-1)
            now = actor(**inputs).logits.float().log_softmax(-1)
            taken = inputs["input_ids"][:, 1:, None]
            ratio = (now[:, :-1].gather(-1, taken) - before[:, :-1].gather(-1, taken)).exp()
            divergence = (before.exp() * (before - now)).sum(-1).mean()
            loss = (-ratio.clamp(0.8, 1.2).mean() + 0.01 * divergence) / parts
            actor.set_requires_gradient_sync(part + 1 == parts)
            session.scaler.scale(loss).backward()
        norm = session.scaler.clip_grad_norm_(optimizer, 1.0)
        session.scaler.step(optimizer)
        session.scaler.update()
        optimizer.zero_grad()
        losses.append(mean_over_ranks(loss))
        divergences.append(mean_over_ranks(divergence))
    found = {**told(session), "losses": losses, "divergences": divergences, "clipped": float(norm)}
    session.detach()
    return found


class Block(nn.Module):
    """Two layers; the first can be spread over ranks by its outputs, the second by its inputs. `gain` makes it overflow in between."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.gain = nn.Linear(16, 32), nn.Linear(32, 16), 1.0

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(nn.functional.softsign(self.up(x) * self.gain))
        return nn.functional.softsign(x)


@contextmanager
def accelerator_on_two_axes(kind: str) -> Iterator[Accelerator]:
    """One with accelerate's `parallelism_config`, ported to a CPU as `accelerator_of_fsdp2` is; its state is asked for in `prepare` too."""
    AcceleratorState._reset_state(reset_partial_state=False)
    make_state = AcceleratorState.__init__

    def make_state_of_fsdp2(state: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        make_state(state, *args, **kwargs)
        if state.__dict__.get("fsdp_plugin") is None:
            as_fsdp2(state, "fp16", "Block")
        state.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = make_state_of_fsdp2
    try:
        sizes = {"dp_replicate_size": 2} if kind == "HSDP" else {"tp_size": 2}
        axes = ParallelismConfig(dp_shard_size=2, **sizes)
        yield Accelerator(mixed_precision="fp16", cpu=True, parallelism_config=axes)
    finally:
        AcceleratorState.__init__ = make_state


def on_two_axes(kind: str, fault: str, steps: int = 6, by_accelerate: bool = False) -> dict[str, Any]:
    """Four ranks, 2 by 2: FSDP in groups that hold copies ("HSDP"), or FSDP of layers that are spread over ranks ("TP")."""
    with ExitStack() as stack:
        return _on_two_axes(kind, fault, steps, by_accelerate, stack)


def _on_two_axes(kind: str, fault: str, steps: int, by_accelerate: bool, stack: ExitStack) -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    names = ("dp_replicate", "dp_shard") if kind == "HSDP" else ("dp_shard", "tp")
    accelerator = stack.enter_context(accelerator_on_two_axes(kind)) if by_accelerate else None
    mesh = accelerator.torch_device_mesh if accelerator else init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
    if kind == "TP":
        for block in model:
            parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if fault == "one part" and dist.get_rank() % 2:  # of what is spread over ranks, this rank's alone
        model[1].up.weight.data.to_local().mul_(1e7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if accelerator:
        session = hf_amp.attach(accelerator, init_scale=1024.0)
        model, prepared = accelerator.prepare(model, optimizer)
        optimizer = prepared.optimizer
    else:
        sharded(model, "Block", mesh if kind == "HSDP" else mesh["dp_shard"])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        session = AmpSession.for_model(model, optimizer, init_scale=1024.0)
    data_rank = dist.get_rank() if kind == "HSDP" else dist.get_rank() // 2
    norms, losses = [], []
    for number in range(1, steps + 1):
        here = number == 3 and data_rank == 1
        torch.manual_seed(10 * number + data_rank)
        x = torch.randn(4, 16)
        model[1].gain = 1e7 if here and fault == "activation" else 1.0
        x = x * torch.nan if here and fault == "NaN batch" else x
        loss = model(x).square().mean()
        loss = loss * torch.inf if here and fault == "loss" else loss
        session.scaler.scale(loss).backward()
        whole = torch.cat([p.grad.full_tensor().reshape(-1) for p in model.parameters()])
        norms.append(float(whole.norm()) / session.scaler.get_scale())
        session.scaler.step(optimizer)
        session.scaler.update()
        optimizer.zero_grad()
        losses.append(mean_over_ranks(loss))
    whole = [p.full_tensor() for p in model.parameters()]
    found = {**told(session), "norms": norms, "losses": losses, "weights": [p.double().sum().item() for p in whole]}
    session.detach()
    return found


def one_of_many(kind: str, steps: int = 4) -> dict[str, Any]:
    """The rescaled Llama as people train it: with checkpointing, adapters, frozen parameters, another strategy."""
    model, batches, _ = CASES["Llama"].build(seed=0)
    if kind.startswith("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": kind.endswith("reentrant")})
    if kind == "LoRA":
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    if kind == "frozen":
        model.model.embed_tokens.weight.requires_grad_(False)
    sharded(model, BLOCKS["Llama"])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    options = {"scaling_strategy": kind} if kind.isupper() else {}
    session = AmpSession.for_model(model, optimizer, init_scale=1024.0, **options)
    for _ in range(steps):
        batch = part_of(next(batches))
        output = model(**{name: x for name, x in batch.items() if name != "labels" or kind != "loss outside"})
        if kind == "loss outside":
            logits, taken = output.logits.float()[:, :-1], batch["input_ids"][:, 1:]
            step(session, optimizer, nn.functional.cross_entropy(logits.flatten(0, 1), taken.flatten()))
        else:
            step(session, optimizer, output.loss)
    session.scaler.flush()
    found = told(session)
    session.detach()
    return found
