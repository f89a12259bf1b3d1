"""27 situations in which training goes wrong, and what stock, debugging tools and hf_amp make of each.

Every contender runs the same loop over accelerate on the same models and batches. What each reports is judged by fixed rules:

- *survives*: no exception ends the run, and its last step has a finite loss and moves parameters, all of which, and all buffers,
  are finite;
- *told*: in words, at or after the step in which the fault sets in; *by a figure*: a loss or gradient norm that is inf, NaN or 0,
  which the loop would log;
- *cause*: see `Contender.judged`; *half*: it says truly where in forward or backward something is not finite, but not why;
- *place*: the module, parameter, buffer or part of the batch is named, or its line of source; *half*: what is around it;
- *operator*: its name and its line are both in the report;
- *false alarms*: reports before anything is wrong, and runs ended where the scale alone would have come right.

`OMP_NUM_THREADS=1 python -m tests.benchmarks.test_situations --out tests/benchmarks/results`
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import math
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.debug_utils import DebugUnderflowOverflow

import hf_amp
from hf_amp import AmpEvent, AmpSession, Cause, MixedPrecisionConfig
from hf_amp.emulation import EmulatedPrecision
from hf_amp.fallback.module_precision import ForwardContext
from tests.benchmarks.measuring import Row, parser, write
from tests.benchmarks.situations import FAULT, SITUATIONS, STEPS, Situation
from tests.each import for_each, forget_accelerators

RIGHT, HALF, WRONG = 1.0, 0.5, 0.0
IN_FORWARD = (Cause.ACTIVATION, Cause.ROUNDING, Cause.MODEL, Cause.LOSS, Cause.INPUT, Cause.WEIGHTS, Cause.BUFFER)
"""Causes of values that are not finite before backward begins."""


@dataclass
class Report:
    """What a contender said in one step.

    Attributes:
        step: of the loop.
        text: all its words.
        event: hf_amp's own record.
    """

    step: int
    text: str
    event: AmpEvent | None = None


@dataclass
class Outcome:
    """What became of one run, and what was said of it."""

    survives: bool = False
    reports: list[Report] = field(default_factory=list)
    figure: bool = False
    learns: bool = False
    """Whether the newest gradients are finite and not zero: momentum moves parameters without any."""


@dataclass(frozen=True)
class Verdict:
    """An outcome, judged. Cause and place: 1 right, 0.5 half, 0 wrong or nothing."""

    survives: bool
    told: bool
    figure: bool
    cause: float
    place: float
    operator: bool
    false_alarm: bool
    said: str


class Contender:
    """Stock: accelerate, `torch.amp.GradScaler` and autocast (on a CPU emulated), clipping to a norm of 1."""

    name = "stock Accelerate, GradScaler"

    def begin(self, situation: Situation, model: nn.Module) -> Accelerator:
        """An Accelerator for the run."""
        accelerator = Accelerator(mixed_precision=situation.precision, cpu=True)
        if situation.precision == "fp16":
            accelerator.native_amp = False  # while models are prepared: CPU autocast would keep emulation out
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=situation.init_scale)
            ForwardContext(EmulatedPrecision).install(model)
        return accelerator

    def prepared(self, accelerator: Accelerator) -> None:
        """Called after `prepare`."""
        accelerator.native_amp = True

    def watching(self) -> Any:
        """A context around a whole step."""
        return nullcontext()

    def events(self) -> list[AmpEvent]:
        """What was recorded since the last call."""
        return []

    def found_offline(self) -> str:
        """What a look at the files of the newest step shows; "" where nothing is not finite."""
        return ""

    def recovers(self, error: Exception) -> bool:
        """Whether the step that raised `error` can be tried again."""
        return False

    def end(self) -> None:
        """Called after the run."""

    def judged(self, situation: Situation, report: Report) -> tuple[float, float, bool]:
        """How right cause, place and operator are. An exception of forward itself says that something there is not finite."""
        return (HALF if situation.cause in IN_FORWARD and "nan" in report.text else WRONG), WRONG, False


class Debug(Contender):
    """transformers' `debug="underflow_overflow"`.

    Its last frame is right where it shows the cause: a parameter, the batch, or the output of the right module from what is finite.
    """

    name = "DebugUnderflowOverflow"

    def begin(self, situation: Situation, model: nn.Module) -> Accelerator:
        accelerator = super().begin(situation, model)
        DebugUnderflowOverflow(model)
        return accelerator

    def judged(self, situation: Situation, report: Report) -> tuple[float, float, bool]:
        frames = re.findall(r"^ {17} (\S*) (\w+)\n((?: *\S+ +\S+ .*\n?)+)", report.text, re.M)
        if not frames or situation.cause not in IN_FORWARD:
            return WRONG, WRONG, False
        module, _, lines = frames[-1]
        bad = [line.split()[-1] for line in lines.splitlines() if re.search(r"\b(inf|nan)\b", line)]
        place = _named(situation.place, [module, *(f"{module}.{name}" for name in bad)])
        only_output = bool(bad) and all(name.startswith("output") for name in bad)
        shows = {
            Cause.ACTIVATION: only_output and "inf" in lines and "nan" not in lines and place == RIGHT,
            Cause.WEIGHTS: place == RIGHT,
            Cause.INPUT: len(frames) == 1 and "input[0]" in bad,
        }
        return (RIGHT if shows.get(situation.cause) else HALF), place, False


class AnomalyMode(Contender):
    """`torch.autograd.set_detect_anomaly(True)`: says whose backward gives NaN, and where its forward was called."""

    name = "autograd anomaly mode"

    def watching(self) -> Any:
        return torch.autograd.set_detect_anomaly(True)

    def judged(self, situation: Situation, report: Report) -> tuple[float, float, bool]:
        found = re.search(r"Function '(\w+)Backward\d*' returned nan", report.text)
        if not found:
            return super().judged(situation, report)
        of_operator = situation.operator.replace("_", "") in found[1].lower() if situation.operator else False
        at_line = bool(situation.line) and situation.line in report.text
        right = situation.cause is Cause.DERIVATIVE and (of_operator or not situation.operator)
        half = of_operator or situation.cause in (Cause.DERIVATIVE, Cause.SCALE)
        place = RIGHT if at_line and situation.place else WRONG
        return (RIGHT if right else HALF if half else WRONG), place, of_operator and at_line


class MsProbe(Contender):
    """msprobe's dump of a step's statistics, read afterwards: the first call that gives inf or NaN from what is finite.

    Right where it shows the cause: inf from the right operator, or a derivative; half where the operator is right.
    Written from its documentation; runs only where it is installed, and after all others, because it wraps torch for good.
    """

    name = "msprobe"
    _folder: ClassVar = Path(tempfile.gettempdir()) / f"msprobe_{os.getpid()}"
    """One for all runs: there is one debugger in a process."""

    def __init__(self) -> None:
        from msprobe.pytorch import PrecisionDebugger  # type: ignore[import-not-found]

        self._debugger = PrecisionDebugger(task="statistics", level="L1", dump_path=str(self._folder))

    @contextmanager
    def watching(self) -> Iterator[None]:
        self._debugger.start()
        try:
            yield
        finally:
            self._debugger.stop()
            self._debugger.step()

    def found_offline(self) -> str:
        newest = max(self._folder.rglob("dump.json"), key=lambda file: file.stat().st_mtime, default=None)
        if newest is None:
            return ""
        calls, stacks = (json.loads((newest.with_name(name)).read_text()) for name in ("dump.json", "stack.json"))
        return first_bad_call(calls["data"], stacks)

    def judged(self, situation: Situation, report: Report) -> tuple[float, float, bool]:
        call = report.text.partition(":")[0]
        of_operator = bool(situation.operator) and f".{situation.operator}." in call
        at_line = bool(situation.line) and situation.line in report.text
        backward = ".backward" in call
        shows = (
            situation.cause is Cause.DERIVATIVE
            if backward
            else situation.cause is Cause.ACTIVATION and "inf" in report.text
        )
        cause = RIGHT if of_operator and shows else HALF if of_operator else WRONG
        return cause, RIGHT if at_line and situation.place else WRONG, of_operator and at_line


def first_bad_call(calls: dict[str, Any], stacks: dict[str, Any]) -> str:
    """The first call of a dump whose output is not finite and whose inputs are, with its lines of source; "" where none is."""

    def is_bad(values: Any) -> bool:
        if isinstance(values, dict) and "Max" in values:
            return any(not math.isfinite(float(values[key])) for key in ("Max", "Min") if values.get(key) is not None)
        inside = values.values() if isinstance(values, dict) else values if isinstance(values, list) else ()
        return any(map(is_bad, inside))

    for name, call in calls.items():
        inputs = [call.get(key) for key in ("input", "input_args", "input_kwargs")]
        if is_bad(call.get("output")) and not is_bad(inputs):
            forward = name.replace(".backward", ".forward")
            known = [lines for names, lines in stacks.values() if forward in names]
            return f"{name}: {json.dumps(call['output'])} {known}"
    return ""


class HfAmp(Contender):
    """hf_amp in its default options, by its first event of the fault."""

    name = "hf_amp"

    def __init__(self) -> None:
        self.session: AmpSession
        self._seen = 0

    def begin(self, situation: Situation, model: nn.Module) -> Accelerator:
        accelerator = Accelerator(mixed_precision=situation.precision, cpu=True)
        config = MixedPrecisionConfig(init_scale=situation.init_scale)
        self.session, self._seen = hf_amp.attach(accelerator, config), 0
        return accelerator

    def prepared(self, accelerator: Accelerator) -> None:
        pass

    def events(self) -> list[AmpEvent]:
        new, self._seen = self.session.events[self._seen :], len(self.session.events)
        return [event for event in new if event.cause is not None]

    def recovers(self, error: Exception) -> bool:
        return self.session.recover(error)

    def end(self) -> None:
        self.session.detach()

    def judged(self, situation: Situation, report: Report) -> tuple[float, float, bool]:
        if report.event is None:
            return super().judged(situation, report)
        names = [*report.event.modules, *re.findall(r"[\w.]*\w", report.text)]
        place = _named(situation.place, names)
        operator = (
            re.search(rf"\b{situation.operator} at \S+ \(`[^`]*{re.escape(situation.line)}", report.text) is not None
        )
        half = HALF if report.event.cause is Cause.UNKNOWN else WRONG
        return (RIGHT if report.event.cause is situation.cause else half), place, operator


HAS_MSPROBE = importlib.util.find_spec("msprobe") is not None
CONTENDERS = (Contender, Debug, AnomalyMode, HfAmp, *([MsProbe] if HAS_MSPROBE else []))
CHECKED = (
    "overflow beside a mask of -inf",
    "overflow behind autograd.grad in forward",
    "large targets need a scale below 1",
    "a gradient leaves the format, in backward alone",
    "root at zero inside of the model",
    "BF16, clipping: 0/0 in a branch that `where` hides",
    "rounding: acos of a cosine above 1",
    "a row is fully masked",
    "log of zero in the loss",
    "CTC: labels longer than inputs",
    "inf in a batch that is an object",
    "state carried on from a step that overflowed",
    "NaN in a codebook",
)
"""Situations of the test; the benchmark runs all."""


def _named(place: str, names: list[str]) -> float:
    """Whether one of `names` is the place, or half of them what is around or in it."""
    if not place or place in names:
        return RIGHT if place else WRONG
    return (
        HALF
        if any(name and (place.startswith(f"{name}.") or name.startswith(f"{place}.")) for name in names)
        else WRONG
    )


def run(situation: Situation, contender: Contender) -> Outcome:
    """One situation with one contender."""
    forget_accelerators()
    torch.manual_seed(0)
    np.random.seed(0)
    made = situation.make()
    accelerator = contender.begin(situation, made.model)
    prepared: tuple[Any, ...] = accelerator.prepare(made.model, *made.optimizers(made.model))
    model, *optimizers = prepared
    contender.prepared(accelerator)
    outcome, moved = Outcome(), False
    for step in range(1, STEPS + 1):
        if step == FAULT:
            made.break_it()
        batch = made.batch(step >= FAULT if made.stays else step == FAULT)
        before = [p.detach().clone() for p in made.model.parameters()]
        with _heard(outcome, step, contender) as heard:
            error = _step(accelerator, contender, model, made.loss, optimizers, batch, outcome, step)
            if error is not None and contender.recovers(error):
                error = _step(accelerator, contender, model, made.loss, optimizers, batch, outcome, step)
            if error is not None:
                heard.append(f"{type(error).__name__}: {error}")
        if error is not None:
            break
        moved = any(not torch.equal(p, former) for p, former in zip(made.model.parameters(), before, strict=True))
    else:
        held = [*made.model.parameters(), *made.model.buffers()]
        outcome.survives = (
            moved
            and outcome.learns
            and all(bool(x.isfinite().all()) for x in held)
            and _finite(made.loss(model, batch))
        )
    contender.end()
    return outcome


def _finite(loss: Tensor) -> bool:
    return math.isfinite(float(loss))


def _step(
    accelerator: Accelerator,
    contender: Contender,
    model: Any,
    loss_of: Any,
    optimizers: list[Any],
    batch: Any,
    outcome: Outcome,
    step: int,
) -> Exception | None:
    """One optimizer step; what it raised."""
    try:
        with contender.watching():
            loss = loss_of(model, batch)
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
    except Exception as error:
        for optimizer in optimizers:
            optimizer.zero_grad()
        return error
    outcome.learns = _finite(norm) and float(norm) > 0
    outcome.figure |= step >= FAULT and not (outcome.learns and _finite(loss))
    return None


@contextmanager
def _heard(outcome: Outcome, step: int, contender: Contender) -> Iterator[list[str]]:
    """Collects what is printed, warned of, recorded and raised in a step."""
    extra: list[str] = []
    printed = io.StringIO()
    with warnings.catch_warnings(record=True) as warned, redirect_stdout(printed), redirect_stderr(printed):
        warnings.simplefilter("always")
        yield extra
    events = contender.events()
    outcome.reports += [Report(step, event.message, event) for event in events]
    about = [str(w.message) for w in warned if re.search(r"\b(nan|inf)\b|Backward", str(w.message))]
    about += [found] if step >= FAULT and (found := contender.found_offline()) else []
    if (about or extra) and not events:
        outcome.reports.append(Report(step, "\n".join([printed.getvalue(), *about, *extra]).strip()))


def judge(situation: Situation, contender: Contender, outcome: Outcome) -> Verdict:
    """The first report from the fault on, beside the truth."""
    after = [r for r in outcome.reports if r.step >= FAULT]
    report = next((r for r in after if r.step >= situation.report_at), after[-1] if after else None)
    early = any(r.step < FAULT for r in outcome.reports)
    cause, place, operator = contender.judged(situation, report) if report else (WRONG, WRONG, False)
    if report and situation.says not in report.text:
        cause = min(cause, HALF)
    ended = report is not None and report.event is None and situation.cause is Cause.SCALE
    named = report.event.cause.value if report and report.event and report.event.cause else ""
    return Verdict(
        outcome.survives, report is not None, outcome.figure, cause, place, operator, early or ended,
        f"{named}: {report.text}" if report else "",
    )  # fmt: skip


def situations(chosen: Sequence[Situation] = SITUATIONS) -> tuple[list[Row], list[Row]]:
    """A row a contender, and a row a situation with what each contender made of it."""
    logging.disable(logging.WARNING)  # what hf_amp says is read from its events
    by_contender = {
        kind: [judge(s, contender, run(s, contender)) for s in chosen for contender in [kind()]] for kind in CONTENDERS
    }
    logging.disable(logging.NOTSET)
    totals: list[Row] = [_total(kind.name, chosen, found) for kind, found in by_contender.items()]
    if MsProbe not in by_contender:
        totals.append({"contender": "msprobe", **dict.fromkeys(list(totals[0])[1:], "not installed")})
    each: list[Row] = [
        {
            "situation": s.name,
            "truth": " in ".join(filter(None, (s.cause.value, s.place))) + f", {s.operator}" * bool(s.operator),
            **{kind.name: _in_words(s, found[index]) for kind, found in by_contender.items()},
        }
        for index, s in enumerate(chosen)
    ]
    return totals, each


def _total(name: str, chosen: Sequence[Situation], found: Sequence[Verdict]) -> Row:
    known = list(zip(chosen, found, strict=True))
    places = [v.place for s, v in known if s.place]
    causes = [v.cause for v in found]
    return {
        "contender": name,
        "survives": sum(v.survives for v in found),
        "lost_though_it_could_survive": sum(s.survivable and not v.survives for s, v in known),
        "told": sum(v.told for v in found),
        "by_a_figure_alone": sum(v.figure and not v.told for v in found),
        "causes_right": causes.count(RIGHT),
        "half_right": causes.count(HALF),
        "causes_missed": len(causes) - causes.count(RIGHT),
        "places_right": places.count(RIGHT),
        "places_half_right": places.count(HALF),
        "places_missed": len(places) - places.count(RIGHT),
        "operator_and_line_right": sum(v.operator for s, v in known if s.operator),
        "false_alarms": sum(v.false_alarm for v in found),
    }


def _in_words(situation: Situation, verdict: Verdict) -> str:
    """One cell: what was right of cause, place, operator, and whether the run goes on."""
    parts = [f"{'½ ' * (verdict.cause == HALF)}cause"] if verdict.cause else []
    parts += [f"{'½ ' * (verdict.place == HALF)}place"] if situation.place and verdict.place else []
    parts += ["operator"] if situation.operator and verdict.operator else []
    parts += ["false alarm"] if verdict.false_alarm else []
    said = ", ".join(parts) or ("told, wrong" if verdict.told else "a figure" if verdict.figure else "nothing")
    return f"{said}; {'goes on' if verdict.survives else 'lost' if situation.survivable else 'cannot go on'}"


def main() -> None:
    options = parser().parse_args()
    totals, each = situations()
    write("situations", {"rows": totals, "details": each}, options.out)


@for_each("name", CHECKED)
def test_hf_amp_names_cause_place_and_operator(name: str) -> None:
    """The first event of the fault, and the run goes on where it can."""
    situation = next(s for s in SITUATIONS if s.name == name)
    contender = HfAmp()
    found = judge(situation, contender, run(situation, contender))
    assert found.cause == RIGHT, found.said
    assert found.place == RIGHT or not situation.place, found.said
    assert found.operator or not situation.operator, found.said
    assert found.survives or not situation.survivable
    assert not found.false_alarm


def test_the_other_contenders_are_judged_by_what_they_print() -> None:
    """A root at zero: stock says nothing in words; anomaly mode ends the run; a NaN in a weight is what the debugger is right in."""
    root = next(s for s in SITUATIONS if s.name.startswith("root at zero inside"))
    weight = next(s for s in SITUATIONS if s.name == "NaN in a weight")
    stock, anomaly, debug = (
        judge(s, c, run(s, c)) for s, c in ((root, Contender()), (root, AnomalyMode()), (weight, Debug()))
    )
    assert (stock.survives, stock.told, stock.figure, stock.cause) == (True, False, True, WRONG)
    assert (anomaly.survives, anomaly.told) == (False, True)
    assert "returned nan" in anomaly.said
    assert (debug.told, debug.cause, debug.place) == (True, RIGHT, RIGHT)


def test_a_dump_of_msprobe_is_read_as_documented() -> None:
    """The first call that gives NaN from finite inputs, with where it was made; not those that only pass it on."""
    fine, bad = {"Max": 1.0, "Min": -1.0}, {"Max": math.nan, "Min": math.nan}
    calls = {
        "Functional.linear.0.forward": {"input_args": [fine], "input_kwargs": {}, "output": [fine]},
        "Torch.acos.0.forward": {"input_args": [fine], "input_kwargs": {}, "output": [bad]},
        "Tensor.__add__.0.forward": {"input_args": [fine, bad], "input_kwargs": {}, "output": [bad]},
    }
    stacks = {"0": [["Torch.acos.0.forward"], ["File model.py, line 3, in forward, \n return torch.acos(cosine)"]]}
    found = first_bad_call(calls, stacks)
    assert found.startswith("Torch.acos.0.forward: ")
    assert "torch.acos(cosine)" in found
    assert first_bad_call(dict(list(calls.items())[:1]), stacks) == ""


if __name__ == "__main__":
    main()
