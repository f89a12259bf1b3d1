"""Random models with one random fault each, in a real loop: what was wrong, what was told, and what became of the run."""

from __future__ import annotations

import copy
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from torch import Tensor, nn

import hf_amp
from hf_amp import AmpEvent, Cause, EventKind, MixedPrecisionConfig
from tests.fallback.random_models import FAMILIES, Batch, Site, Task, is_layer, random_batch, random_body, token_loss

TRIALS = 420
"""Faults in the published tables."""


@dataclass
class Trial:
    """One run with one fault.

    Attributes:
        precision: of the accelerator.
        loss: made by "the model itself", "inside" of it by a wrapper, or "outside", in the loop.
        chance: where every random choice comes from.
        model: the model; its parameters are those of the run.
        site: the layer of it in which faults set in.
        eager: whether attention is made of single operators.
        checkpointing: "none", "reentrant" or "non-reentrant".
        where: names of modules of which one is to blame, where it is a module.
        told_in: what the message must name, such as an input.
        loss_outside: what the loop does to the loss.
    """

    precision: str
    loss: str
    chance: random.Random
    model: nn.Module
    site: Site
    eager: bool
    checkpointing: str
    where: tuple[str, ...] = ()
    told_in: str = ""
    loss_outside: Callable[[Tensor], Tensor] | None = None

    def name_of(self, module: nn.Module) -> str:
        return next(name for name, known in self.model.named_modules() if known is module)

    def set_in(self, fault: Callable[[Tensor], Tensor]) -> None:
        """Every forward pass meets `fault` at the site from now on."""
        self.site.fault, self.where = fault, (self.name_of(self.site),)

    def set_in_loss(self, fault: Callable[[Tensor], Tensor]) -> None:
        """Every loss is made with `fault` from now on."""
        if self.loss == "inside":
            self.model.loss_fault = fault
        else:
            self.loss_outside = fault

    def put_right(self) -> None:
        """Takes a fault of the site or of the loss back."""
        self.site.fault = self.loss_outside = None
        if isinstance(self.model, Task):
            self.model.loss_fault = None


@dataclass(frozen=True)
class Fault:
    """A kind of fault.

    Attributes:
        set_in: makes it happen in the batch that is passed, or from that batch on. False where it cannot, in this trial.
        cause: what it is.
        operators: of which the message must name one.
        precisions: in which it is one.
        losses: with which it is one.
        is_shared: whether it is one of the model's own numbers, which all ranks have in common.
        ends: whether it stays: the run cannot go on by itself.
    """

    set_in: Callable[[Trial, Batch], bool | None]
    cause: Cause
    operators: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ("fp16", "fp16", "bf16", "no")
    losses: tuple[str, ...] = ("inside", "outside", "the model itself")
    is_shared: bool = False
    ends: bool = False


FAULTS: dict[str, Fault] = {}
FP16 = ("fp16",)
HALF = ("fp16", "bf16")


def kind(cause: Cause, *operators: str, **facts: Any) -> Callable[[Callable[[Trial, Batch], bool | None]], Any]:
    """Adds what it decorates to the kinds of faults."""

    def add(set_in: Callable[[Trial, Batch], bool | None]) -> Any:
        FAULTS[set_in.__name__] = Fault(set_in, cause, operators, **facts)
        return set_in

    return add


def at_site(cause: Cause, *operators: str, **facts: Any) -> Callable[[Callable[[Site, Tensor, Tensor], Tensor]], Any]:
    """Adds a fault of the site: a function of it, of its values, and of the same normalised to a variance of 1."""

    def add(fault: Callable[[Site, Tensor, Tensor], Tensor]) -> Any:
        def set_in(trial: Trial, batch: Batch) -> bool:
            site = trial.site
            trial.set_in(lambda x: fault(site, x, nn.functional.layer_norm(x.float(), x.shape[-1:])))
            # PyTorch's attention kernel for CPUs makes finite values of a NaN.
            return cause is not Cause.MODEL or trial.eager or "att" not in trial.where[0]

        FAULTS[fault.__name__] = Fault(set_in, cause, operators, **facts)
        return fault

    return add


def corrupt(trial: Trial, tensor: Tensor) -> None:
    """One random element becomes NaN or inf."""
    flat = tensor.data.view(-1)
    flat[trial.chance.randrange(flat.numel())] = trial.chance.choice([torch.nan, torch.inf, -torch.inf])


@kind(Cause.INPUT)
def bad_input(trial: Trial, batch: Batch) -> bool:
    inputs = [name for name, x in batch.items() if x.is_floating_point()]
    inputs = inputs if trial.loss == "inside" else [name for name in inputs if name != "weights"]
    if inputs:
        trial.told_in = trial.chance.choice(inputs)
        corrupt(trial, batch[trial.told_in])
    return bool(inputs)


@kind(Cause.INPUT, losses=("inside",))
def bad_batch_object(trial: Trial, batch: Batch) -> bool:
    if not bad_input(trial, batch):
        return False
    trial.told_in = f"data.{trial.told_in}"
    content = SimpleNamespace(**batch)
    batch.clear()
    batch["data"] = content
    return True


@kind(Cause.WEIGHTS, is_shared=True, ends=True)
def bad_weight(trial: Trial, batch: Batch) -> None:
    trial.told_in, parameter = trial.chance.choice([(n, p) for n, p in trial.model.named_parameters() if p.dim() > 1])
    corrupt(trial, parameter)


@kind(Cause.BUFFER, is_shared=True, ends=True)
def bad_buffer(trial: Trial, batch: Batch) -> bool:
    trial.told_in = f"{trial.name_of(trial.site)}.offset"
    corrupt(trial, trial.site.offset)
    return trial.eager or "att" not in trial.told_in  # see `at_site`


@kind(Cause.ACTIVATION, "linear", "addmm", precisions=FP16, is_shared=True)
def large_layer(trial: Trial, batch: Batch) -> None:
    """The output of a random layer that leaves FP16's range and not FP32's; what follows brings it back where it can."""
    layers = {
        name: m
        for name, m in trial.model.named_modules()
        if is_layer(m) and any(part.isdigit() for part in name.split("."))
    }
    name, layer = trial.chance.choice(list(layers.items()))
    trial.where = (name,)
    if layer.bias is not None:
        layer.bias.data.fill_(trial.chance.choice([1e5, 3e6, 1e8]))
    else:
        layer.weight.data.fill_(6e4)


@kind(Cause.ACTIVATION, "matmul", "softmax", "baddbmm", precisions=FP16, is_shared=True)
def large_scores(trial: Trial, batch: Batch) -> bool:
    """Queries and keys that FP16 holds, and their products do not."""
    modules = dict(trial.model.named_modules())
    sides = [re.compile(rf"(.*)\.({each})") for each in (r"q_proj|query|q", r"k_proj|key|k")]
    queries, keys = ({found[1]: modules[name] for name in modules if (found := side.fullmatch(name))} for side in sides)
    both = [name for name in queries if name in keys and not hasattr(modules[name], "q_norm")]
    if not both or not trial.eager:
        return False
    name = trial.chance.choice(both)
    trial.where = (name,)
    for side in (queries, keys):
        side[name].weight.data.mul_(3e3 / side[name].weight.data.abs().max())
    return True


@at_site(Cause.ACTIVATION, "matmul", precisions=FP16)
def large_product(site: Site, x: Tensor, unit: Tensor) -> Tensor:
    """A product of activations that leaves FP16's range outside of any layer."""
    return x + (unit * 1e3) @ (unit * 1e3).mT @ unit * 1e-9


@kind(Cause.ACTIVATION, "matmul", "masked_fill", precisions=FP16)
def overflow_beside_a_mask(trial: Trial, batch: Batch) -> None:
    """Scores that overflow, among -inf that is there by design."""

    def fault(x: Tensor) -> Tensor:
        unit = nn.functional.layer_norm(x.float(), x.shape[-1:])
        return x + trial.site.scores(unit * 1e3, unit * 1e3).softmax(-1) @ unit

    trial.set_in(fault)
    trial.where = (trial.name_of(trial.site.scores),)


@kind(Cause.ACTIVATION, "matmul", precisions=FP16)
def overflow_by_chance(trial: Trial, batch: Batch) -> bool:
    """One that depends on random numbers of NumPy or of Python: with others there is none."""
    source = trial.chance.choice(["numpy", "python"])
    np.random.seed(1)  # of whose numbers the first is below 0.5, and the second is not; Python's likewise
    random.seed(1)

    def fault(x: Tensor) -> Tensor:
        unit = nn.functional.layer_norm(x.float(), x.shape[-1:])
        factor = 1e3 if trial.site.drawn[source] < 0.5 else 1.0
        return x + (unit * factor) @ (unit * factor).mT @ unit * 1e-9

    trial.set_in(fault)
    return trial.checkpointing == "none"  # which restores torch's random numbers alone


@at_site(Cause.ACTIVATION, "matmul", precisions=FP16)
def overflow_of_inner_gradient(site: Site, x: Tensor, unit: Tensor) -> Tensor:
    """Forces, as `autograd.grad` makes them inside of forward, whose products leave FP16's range."""
    with torch.enable_grad():
        place = unit if unit.requires_grad else unit.detach().requires_grad_()
        (force,) = torch.autograd.grad(place.square().sum(), place, create_graph=True)
    return x + (force * 1e3) @ (force * 1e3).mT @ unit * 1e-9


@kind(Cause.ACTIVATION, precisions=FP16)
def large_gradient(trial: Trial, batch: Batch) -> bool:
    """One that leaves FP16 in backward only, and at any scale."""
    trial.set_in(lambda x: x + (x - x.detach()) * 1e16)
    if not is_layer(trial.site.inner):
        return False  # the gradient goes on in FP32 to whatever comes before
    trial.where = (*trial.where, trial.name_of(trial.site.inner))
    return True


@at_site(Cause.ROUNDING, "acos", precisions=HALF)
def rounded_cosine(site: Site, x: Tensor, unit: Tensor) -> Tensor:
    """A cosine that is 1 and a little in half precision, and less in FP32."""
    norms = unit.norm(dim=-1, keepdim=True)
    return x + torch.acos((unit @ unit.mT) / (norms * norms.mT) * (1 - 4e-6)).mean(-1, keepdim=True)


@at_site(Cause.ROUNDING, "reciprocal", "div", precisions=FP16)
def reciprocal_of_underflow(site: Site, x: Tensor, unit: Tensor) -> Tensor:
    """1 by a product that FP16 rounds to 0."""
    squares = ((unit * 1e-5) @ (unit * 1e-5).mT).diagonal(dim1=-2, dim2=-1)
    return x + 1e-12 * (1 / squares).unsqueeze(-1)


@at_site(Cause.MODEL, "softmax")
def masked_row(site: Site, x: Tensor, unit: Tensor) -> Tensor:
    scores = unit @ unit.mT
    scores[..., 0, :] = -torch.inf
    return x + scores.softmax(-1) @ unit


@at_site(Cause.MODEL, "log")
def log_of_negative(site: Site, x: Tensor, unit: Tensor) -> Tensor:
    return x + torch.log(-1 - unit.abs())


@at_site(Cause.MODEL, "mean")
def mean_of_nothing(site: Site, x: Tensor, unit: Tensor) -> Tensor:
    return x + unit[..., :0].mean(-1, keepdim=True)


@at_site(Cause.MODEL, "div")
def division(site: Site, x: Tensor, unit: Tensor) -> Tensor:
    """Zero by zero in a module, whatever the precision."""
    return x * ((x - x) / (x - x))


@at_site(Cause.MODEL, "mul")
def explosion(site: Site, x: Tensor, unit: Tensor) -> Tensor:
    """What FP32 does not hold either."""
    return x + (unit * 1e30) * (unit * 1e30)


@at_site(Cause.DERIVATIVE, "Sqrt")
def root_of_zero(site: Site, x: Tensor, unit: Tensor) -> Tensor:
    """A finite value with an infinite derivative."""
    return x + (x - x.detach()).float().abs().sqrt()


@at_site(Cause.DERIVATIVE, "Sqrt")
def hidden_branch(site: Site, x: Tensor, unit: Tensor) -> Tensor:
    """A root of zero that `torch.where` does not choose: zero times infinity in backward."""
    apart = unit - unit.detach()
    return x + torch.where(apart > 0, apart.sqrt(), apart)


@kind(Cause.DERIVATIVE, "Sqrt", losses=("inside",))
def root_in_the_loss(trial: Trial, batch: Batch) -> None:
    trial.set_in_loss(lambda loss: loss + (loss - loss.detach()).abs().sqrt())


@kind(Cause.DERIVATIVE, losses=("outside",))
def root_outside(trial: Trial, batch: Batch) -> None:
    trial.set_in_loss(lambda loss: loss + (loss - loss.detach()).abs().sqrt())
    trial.told_in = "outside of the model"


@kind(Cause.LOSS)
def ignored_labels(trial: Trial, batch: Batch) -> bool | None:
    batch["labels"].fill_(-100)
    return trial.loss != "the model itself" or batch["labels"].dim() > 1


@kind(Cause.LOSS, losses=("inside", "outside"))
def log_of_zero(trial: Trial, batch: Batch) -> None:
    trial.set_in_loss(lambda loss: torch.log((loss - loss).abs()) + loss)


@kind(Cause.LOSS, "ctc_loss", losses=("inside",))
def labels_longer_than_inputs(trial: Trial, batch: Batch) -> None:
    def fault(loss: Tensor) -> Tensor:
        spoken = (torch.randn(3, 1, 4, device=loss.device) * loss).log_softmax(-1)
        words = torch.ones(1, 5, dtype=torch.long, device=loss.device)
        return loss + nn.functional.ctc_loss(spoken, words, torch.tensor([3]), torch.tensor([5]))

    trial.set_in_loss(fault)
    trial.told_in = "labels are longer than inputs"


@kind(Cause.SCALE, precisions=FP16, losses=("inside", "outside"), ends=True)
def large_loss(trial: Trial, batch: Batch) -> None:
    """One that needs a scale below 1."""
    factor = trial.chance.choice([1e7, 1e8, 1e9])
    trial.set_in_loss(lambda loss: loss * factor)


@kind(Cause.SCALE, precisions=FP16, ends=True)
def too_large_a_scale(trial: Trial, batch: Batch) -> None:
    """Set before the first step; see `run`."""


@dataclass
class Outcome:
    """What became of one trial.

    Attributes:
        fault: its name.
        cause: what it is.
        told: the cause told; "elsewhere" where another place or operator was named.
        setting: the model, and in which circumstances.
        message: what was told.
        harm: what was done to the run that should not have been; empty where nothing was.
        decided: what all ranks must agree on.
    """

    fault: str
    cause: str
    told: str
    setting: str
    message: str
    harm: list[str] = field(default_factory=list)
    decided: Any = None


def run(seed: int, rank: int | None = None, device: str = "cpu") -> Outcome | None:
    """One trial; None where the fault could not set in, or did no harm, as an infinity before a function that saturates.

    With a `rank` it is one of two, and a fault that they need not share sets in on one of them alone.
    """
    name = list(FAULTS)[seed % len(FAULTS)]
    fault, chance = FAULTS[name], random.Random(seed)
    for seeded in (torch.manual_seed, np.random.seed, random.seed):
        seeded(seed)
    precision, loss = chance.choice(fault.precisions), chance.choice(fault.losses)
    family = chance.choice(["stack"] * (len(FAMILIES) // 2) + list(FAMILIES))
    loss = "inside" if family == "stack" and loss == "the model itself" else loss
    loss = loss if loss in fault.losses else fault.losses[0]
    checkpointing = chance.choice(["none", "none", "non-reentrant", "reentrant" if rank is None else "none"])
    eager = chance.random() < 0.5 or family == "stack" or name == "large_scores"
    late = chance.random() < 0.2
    config = MixedPrecisionConfig(
        scaling_strategy="PERFORMANCE_OPTIMIZED" if late else chance.choice(["DYNAMIC", "ADAPTIVE"]),
        init_scale=2.0 ** (chance.randint(24, 40) if name == "too_large_a_scale" else chance.randint(0, 6)),
    )
    body, site = random_body(chance, family, checkpointing, eager)
    model = (body if loss == "the model itself" else Task(body)).train()
    trial = Trial(precision, loss, chance, model, site, eager, checkpointing)
    if rank is not None:
        torch.manual_seed(2 * seed + rank)
    embedded = checkpointing != "reentrant" and chance.random() < 0.5
    batch_kind = FAMILIES[family].kind if family != "stack" else "stack"
    ran = _train(
        trial,
        fault,
        config,
        lambda: {n: x.to(device) for n, x in random_batch(batch_kind, embedded and batch_kind == "text").items()},
        late or chance.random() < 0.5,
        rank,
        seed,
        device,
    )
    if ran is None:
        return None
    setting = f"{family} {precision} {config.scaling_strategy.value} checkpointing {checkpointing} loss {loss} eager {eager} seed {seed}"
    skips = [e for e in ran.events if e.kind is EventKind.STEP_SKIPPED]
    if not skips and not ran.harm:
        return None
    harm = [*ran.harm, *_harm(fault, skips, ran)]
    judged = [*skips, AmpEvent(0, EventKind.STEP_SKIPPED, Cause.UNKNOWN)][0]
    cause = judged.cause.value
    told = cause if cause != fault.cause.value or _is_placed(trial, fault, judged) else "elsewhere"
    decided = [(e.step, e.cause.value, e.after, e.modules) for e in skips]
    return Outcome(name, fault.cause.value, told, setting, judged.headline() + ": " + judged.message, harm, decided)


def _is_placed(trial: Trial, fault: Fault, told: AmpEvent) -> bool:
    """Whether the place is told: the module, what it is in, and the operator, as far as there is one."""
    named = {*told.modules, *(word.strip(".") for word in re.findall(r"[\w.]+", told.message))}
    return (
        (not trial.where or not named.isdisjoint(trial.where))
        and trial.told_in in told.message
        and (not fault.operators or any(operator in told.message for operator in fault.operators))
    )


def _harm(fault: Fault, skips: list[AmpEvent], ran: Ran) -> list[str]:
    harm = []
    # Where the verdict is late, the scale may have grown since.
    moved = [e for e in skips if (e.after < e.before if ran.is_late else e.after != e.before)]
    if fault.cause is not Cause.SCALE and moved:
        harm.append(f"scale moved by {len(moved)} skips")
    if ran.plan_changed and fault.cause not in (Cause.ACTIVATION, Cause.ROUNDING):
        harm.append("plan changed")
    if fault.cause is not Cause.SCALE and ran.scale_fell:
        harm.append("scale stays lower")
    if ran.bad_buffers:
        harm.append(f"{ran.bad_buffers[0]} keeps NaN")
    if ran.bad_weights:
        harm.append(f"{ran.bad_weights[0]} is not finite")
    if not fault.ends and ran.put_right and not ran.goes_on:
        harm.append("the run does not go on")
    return harm


@dataclass
class Ran:
    """What a loop has left behind."""

    events: list[AmpEvent]
    harm: list[str]
    plan_changed: bool
    bad_buffers: list[str]
    bad_weights: list[str]
    put_right: bool
    goes_on: bool
    scale_fell: bool
    is_late: bool


def _train(
    trial: Trial,
    fault: Fault,
    config: MixedPrecisionConfig,
    new_batch: Callable[[], Batch],
    fused: bool,
    rank: int | None,
    seed: int,
    device: str,
) -> Ran | None:
    """Steps until some after the fault. None where it cannot set in."""
    chance = trial.chance
    AcceleratorState._reset_state(reset_partial_state=rank is None)
    accelerator = Accelerator(
        mixed_precision=trial.precision,
        cpu=device == "cpu",
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)] if rank is not None else None,
    )
    session = hf_amp.attach(accelerator, config)
    optimizer = torch.optim.AdamW(trial.model.parameters(), lr=1e-3, fused=fused)
    model, optimizer = accelerator.prepare(trial.model, optimizer)
    micro_batches, faulty = chance.choice([1, 1, 2, 3]), chance.randint(1, 3)
    if fault.cause is Cause.BUFFER:
        faulty = max(faulty, 2)  # what is there at the first step may be there by design
    late = config.scaling_strategy.value == "PERFORMANCE_OPTIMIZED"
    stays = late or chance.random() < 0.5  # it looks at a step during the next, where a fault must be still
    steps = faulty + 2 + (0 if stays else 1)
    is_here = fault.is_shared or rank is None or rank == seed // len(FAULTS) % 2
    plan, harm, applied = session.plan, [], 0
    try:
        for step in range(1, steps + 1):
            hit = chance.randrange(1 if fault.ends else micro_batches) if step == faulty else None
            if step == faulty + 1 and not stays:
                trial.put_right()
            for index in range(micro_batches):
                batch = new_batch()
                if index == hit and fault.set_in(trial, batch if is_here else copy.deepcopy(batch)) is False:
                    return None
                if index == hit and not is_here:
                    trial.put_right()
                accelerator.backward(_loss(trial, model, batch) / micro_batches)
            optimizer.step()
            optimizer.zero_grad()
            applied = applied if optimizer.step_was_skipped else step
        session.scaler.flush()
    except Exception as error:
        harm.append(f"raised {type(error).__name__}: {str(error)[:300]}")
    session.detach()
    assert not torch.is_autocast_enabled(device), "the next trial would run in it"
    of_fault = {fault.cause: trial.told_in}
    buffers = [n for n, x in trial.model.named_buffers() if x.is_floating_point() and not _is_sound(x)]
    weights = [n for n, x in trial.model.named_parameters() if not _is_sound(x)]
    return Ran(
        list(session.events),
        harm,
        session.plan != plan,
        [name for name in buffers if name != of_fault.get(Cause.BUFFER)],
        [name for name in weights if name != of_fault.get(Cause.WEIGHTS)],
        not stays,
        max([0, *(e.step for e in session.events if e.kind is EventKind.STEP_SKIPPED)]) < steps,
        late and trial.precision == "fp16" and session.scaler.get_scale() < config.init_scale / 16,
        late,
    )


def _is_sound(x: Tensor) -> bool:
    return bool(x.isfinite().all())


def _loss(trial: Trial, model: nn.Module, batch: Batch) -> Tensor:
    labels, weights = batch.get("labels"), batch.get("weights")
    if trial.loss == "outside":
        inputs = {key: x for key, x in batch.items() if key not in ("labels", "weights")}
        loss = token_loss(model(**inputs)[0], labels, weights)
    elif trial.loss == "inside":
        loss = model(**batch)[0]
    else:
        inputs = {key: x for key, x in batch.items() if key not in ("weights", "decoder_input_ids")}
        loss = model(**inputs).loss
    return loss if trial.loss_outside is None else trial.loss_outside(loss)


def outcomes(trials: int) -> list[Outcome]:
    """Of the first `trials` faults that set in, always the same ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(islice(_all_outcomes(), trials))


def _all_outcomes() -> Iterator[Outcome]:
    return filter(None, map(run, count()))


@dataclass
class Told:
    """What was told of a number of faults: how often each verdict on each fault, and the sums."""

    pairs: Counter[tuple[str, str]]
    right: int = 0
    unknown: int = 0

    @property
    def wrong(self) -> int:
        return self.pairs.total() - self.right - self.unknown


def told_of(ran: list[Outcome]) -> Told:
    """The verdicts on them."""
    reported = Told(Counter())
    for it in ran:
        reported.pairs[it.fault, it.told] += 1
        reported.right += it.told == it.cause
        reported.unknown += it.told == Cause.UNKNOWN.value != it.cause
    return reported
