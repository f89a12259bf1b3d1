"""Reads the JSON-lines log of a run, whole, growing or cut off by a kill, into its history, in bounded memory."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import sys
from array import array
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_amp.config import is_real
from hf_amp.errors import StateError
from hf_amp.events import LOG_FILE, AmpEvent, EventKind
from hf_amp.monitoring.metrics import BY_MODULE


def read_run(run: str | Path) -> RunHistory:
    """The history of a run, given as its folder or its log file, as far as the log goes; read in one pass.

    Raises:
        StateError: there is no log, or it is not one of hf_amp.
    """
    history = named_run(run)
    take_in(EventLogReader(history.path), history)
    return history


def named_run(run: str | Path) -> RunHistory:
    """The history of a run before anything is read.

    Raises:
        StateError: there is no log.
    """
    path = find_log(run)
    return RunHistory(path.resolve().parent.name if path.name == LOG_FILE else path.stem, path)


def take_in(log: EventLogReader, history: RunHistory) -> None:
    """Adds what the log has more than before.

    Raises:
        StateError: the file is not a log of hf_amp.
    """
    for line in log.read():
        history.add(line)
    history.torn_lines = log.torn_lines + log.unfinished


def this_process() -> dict[str, Any]:
    """What tells this process from all others: its id and start, in seconds since 1970, and the machine."""
    import psutil  # a dependency of accelerate, too

    process = psutil.Process()
    return {"pid": process.pid, "started": process.create_time(), "machine": platform.node()}


def _lives(process: Mapping[str, Any]) -> bool | None:
    """Whether the process that `this_process` told of still runs; None where it is another machine's, or not known."""
    import psutil

    if process.get("machine") != platform.node():
        return None
    try:
        return bool(abs(psutil.Process(process["pid"]).create_time() - process["started"]) < 1)
    except psutil.Error:
        return False


def find_log(run: str | Path) -> Path:
    """The log file of a run, given as its folder or as the file itself.

    Raises:
        StateError: there is none. Names the folders below that have one.
    """
    path = Path(run)
    if path.is_file():
        return path
    if (path / LOG_FILE).is_file():
        return path / LOG_FILE
    if not path.is_dir():
        raise StateError(f"{path}: no such file or folder; pass a run's output folder, or the {LOG_FILE} in it.")
    below = sorted(str(found.parent) for depth in ("*", "*/*") for found in path.glob(f"{depth}/{LOG_FILE}"))
    hint = f" Runs below it: {', '.join(below[:5])}." if below else ""
    raise StateError(
        f"{path}: no {LOG_FILE} in this folder. hf_amp writes it into the output folder of a Trainer that has a "
        f"MixedPrecisionCallback, and in loops of your own where session.log_to(folder) says; pass such a folder.{hint}"
    )


LONGEST_LINE = 2**24
"""Bytes; with figures for 100,000 modules a line is shorter."""
_LINE_START = b'{"timestamp": '
_BLANK = b"\0\r\n "
_NEEDED = ("timestamp", "event", "run_id", "step")


class EventLogReader:
    """Reads a log from the beginning, and then what is added to it.

    A line that is not finished is left for the next `read`: the run is writing it, or was killed there. Lines that a
    kill has cut off in the middle of the file are counted and passed over.

    Args:
        path: the log file.

    Attributes:
        torn_lines: lines in the middle of the file that were cut off.
        unfinished: whether the newest line had no end when the file was last read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.torn_lines = 0
        self.unfinished = False
        self._offset = 0
        self._lines = 0

    def read(self) -> Iterator[dict[str, Any]]:
        """Yields every whole line that has not been read yet, as parsed; holds one line in memory.

        Raises:
            StateError: the file is not an event log of hf_amp; names the line.
        """
        with self.path.open("rb") as file:
            file.seek(self._offset)
            self.unfinished = False
            while raw := file.readline(LONGEST_LINE):
                if not raw.endswith(b"\n"):
                    self.unfinished = True
                    if len(raw) == LONGEST_LINE or not _may_become_ours(raw):
                        raise self._foreign(raw)
                    return
                self._offset += len(raw)
                self._lines += 1
                raw = raw.strip(_BLANK)
                if not raw:
                    continue
                try:
                    line = json.loads(raw)
                except (ValueError, RecursionError):
                    if not _may_become_ours(raw):
                        raise self._foreign(raw) from None
                    self.torn_lines += 1
                    continue
                if not isinstance(line, dict) or any(name not in line for name in _NEEDED):
                    raise self._foreign(raw)
                if type(line["step"]) is not int or not 0 <= line["step"] < 2**63:
                    raise self._foreign(raw)
                yield line

    def _foreign(self, raw: bytes) -> StateError:
        shown = ascii(raw[:60].decode("utf-8", "replace"))
        return StateError(
            f"{self.path}: not an event log of hf_amp: line {max(self._lines, 1)} is {shown}. Every line must be a JSON "
            f"object with {', '.join(_NEEDED)}; pass a run's output folder, or the {LOG_FILE} in it."
        )


def _may_become_ours(raw: bytes) -> bool:
    """Whether `raw` is how one of our lines begins."""
    start = raw.lstrip(_BLANK)[: len(_LINE_START)]
    return _LINE_START.startswith(start)


POINTS_KEPT = 8192
"""Points after which a series is thinned; several for every pixel of a picture."""


class Series:
    """(step, value) points in order of steps. Beyond `points_kept` it keeps the extremes of every four neighbours.

    Attributes:
        steps: optimizer steps, int64.
        values: the figure at each, float64.
        counts: how many points were added up to and with each, int64.
    """

    def __init__(self, points_kept: int = POINTS_KEPT) -> None:
        self._points_kept = points_kept
        self.steps, self.values, self.counts = array("q"), array("d"), array("q")

    def add(self, step: int, value: float = math.nan) -> None:
        """Appends one point; another one of the same step replaces it, and counts too."""
        count = self.counts[-1] + 1 if self.counts else 1
        if self.steps and self.steps[-1] == step:
            self.values[-1], self.counts[-1] = value, count
            return
        self.steps.append(step)
        self.values.append(value)
        self.counts.append(count)
        if len(self.steps) >= self._points_kept:
            self._thin()

    def _thin(self) -> None:
        kept: list[int] = []
        newest = len(self.values) - 1
        for start in range(0, newest, 4):
            four = range(start, min(start + 4, newest))
            kept += sorted({min(four, key=self.values.__getitem__), max(four, key=self.values.__getitem__)})
        kept.append(newest)
        self.steps = array("q", (self.steps[i] for i in kept))
        self.values = array("d", (self.values[i] for i in kept))
        self.counts = array("q", (self.counts[i] for i in kept))

    def cut_after(self, step: int) -> None:
        """Forgets what is later than `step`, because a resumed run repeats it."""
        while self.steps and self.steps[-1] > step:
            for numbers in (self.steps, self.values, self.counts):
                numbers.pop()

    def count_after(self, step: int) -> int:
        """How many points later than `step` were added; at the least, where the series was thinned there."""
        earlier = bisect_right(self.steps, step)
        return self.points - self.counts[earlier] + 1 if earlier < len(self) else 0

    @property
    def points(self) -> int:
        """How many points were added."""
        return self.counts[-1] if self.counts else 0

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[tuple[int, float]]:
        return iter(zip(self.steps, self.values, strict=True))


@dataclass(frozen=True)
class LoggedEvent:
    """One `AmpEvent` as a log has it: its kind (here `event`) and its cause ("" for none) may be those of another version."""

    step: int
    event: str
    cause: str
    modules: tuple[str, ...]
    before: float | str | None
    after: float | str | None
    message: str
    by_choice: bool

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> LoggedEvent:
        """The event of a line of a log."""
        return cls(
            step=line["step"],
            event=line["event"],
            cause=str(line.get("cause") or ""),
            modules=tuple(map(str, line.get("modules") or ())),
            before=_plain(line.get("before")),
            after=_plain(line.get("after")),
            message=str(line.get("message", "")),
            by_choice=line.get("by_choice") is True,
        )


def _plain(value: Any) -> float | str | None:
    """A finite number, text or None; anything else as text."""
    return value if value is None or is_real(value) else str(value)


@dataclass(frozen=True)
class Incident(LoggedEvent):
    """The newest of alike events, and the steps of all of them. Alike are those of one kind, cause and modules."""

    occurrences: Series

    @property
    def first_step(self) -> int:
        """Optimizer step of the first."""
        return self.occurrences.steps[0]

    @property
    def last_step(self) -> int:
        """Optimizer step of the newest."""
        return self.occurrences.steps[-1]

    @property
    def count(self) -> int:
        """How many."""
        return self.occurrences.points


LARGEST_GROUPS = 500
"""Different incidents that are kept apart; further ones go into one more."""
MOST_NAMES = 1000
"""Figures, or causes, in one log; hf_amp has some 40, the rest are the loop's own."""
MOST_MODULES = 100_000
CHANGES_KEPT = 1000
"""Changes of precision, and resumptions; a plan cannot flap, so that a run has a handful."""
POINTS_KEPT_BY_MODULE = STEPS_KEPT_BY_INCIDENT = 512
"""There can be thousands of modules, and a picture has columns for a tenth of these."""

_MODULE_FIGURES = tuple(metric.name for metric in BY_MODULE)
_INCIDENTS = {kind.value for kind in EventKind if kind.needs_attention or kind is EventKind.RANKS_PARTED}
_NAMES_OF_0_1 = {"hopeless": "stalled", "statistics_put_back": "buffers_restored", "transitions": "precision_changes"}
"""Events and figures that hf_amp 0.1 wrote under another name."""
_NO_FIGURES = {"timestamp", "level", "run_id", "rank", *_NAMES_OF_0_1} | LoggedEvent.__dataclass_fields__.keys()


@dataclass
class RunHistory:
    """One run, as far as its log goes. A resumed run goes on where it was resumed; a run that starts over replaces the former.

    Attributes:
        name: what people call the run: its folder.
        path: its log file.
        run_id: the newest run id in the log; None before the first line.
        started: UTC time of the first line of this run, as written.
        newest: UTC time of the newest line.
        newest_step: highest optimizer step in the log.
        ended: whether training came to its end.
        what_ran: what the log says about the precision and the device.
        precision: default precision at the start.
        config: the options in force.
        facts: name → what else the log says of how the run was set up: model, device, settings, versions, process.
        figures: name of a figure → its values over time.
        modules: name of a figure by module → module → its values over time.
        skips: cause → (optimizer step, loss scale of the skipped step).
        precision_changes: those that changed something.
        resumed_at: optimizer steps at which the run was resumed.
        former_runs: runs that were begun in the same file before.
        lines: lines read.
        torn_lines: lines that were cut off.
    """

    name: str
    path: Path
    run_id: str | None = None
    started: str | None = None
    newest: str | None = None
    newest_step: int = 0
    ended: bool = False
    what_ran: str = ""
    precision: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    figures: defaultdict[str, Series] = field(default_factory=lambda: defaultdict(Series))
    modules: defaultdict[str, defaultdict[str, Series]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(lambda: Series(POINTS_KEPT_BY_MODULE)))
    )
    skips: defaultdict[str, Series] = field(default_factory=lambda: defaultdict(Series))
    precision_changes: list[LoggedEvent] = field(default_factory=list)
    resumed_at: list[int] = field(default_factory=list)
    former_runs: int = 0
    lines: int = 0
    torn_lines: int = 0
    _groups: dict[tuple[str, str, tuple[str, ...]], Incident] = field(default_factory=dict)

    @property
    def state(self) -> str:
        """`empty`, `finished`, `running`, `killed`, or, where its process is not to be seen from here, `unfinished`."""
        if self.lines == 0 or self.ended:
            return "finished" if self.lines else "empty"
        return {True: "running", False: "killed", None: "unfinished"}[_lives(self.facts.get("process", {}))]

    @property
    def incidents(self) -> list[Incident]:
        """What needed attention, alike events together, in order of first steps."""
        return sorted(self._groups.values(), key=lambda incident: incident.first_step)

    @property
    def latest(self) -> dict[str, float]:
        """The newest value of every figure."""
        return {name: series.values[-1] for name, series in sorted(self.figures.items()) if len(series)}

    @property
    def skipped_by_cause(self) -> Counter[str]:
        """Skipped steps of this run in the log, by cause."""
        return Counter({cause: series.points for cause, series in self.skips.items() if series.points})

    @property
    def changed_modules(self) -> dict[str, LoggedEvent]:
        """Module → how it came to the precision that it has now, where that is not the one it had at first.

        "" stands for the whole model.
        """
        first: dict[str, float | str | None] = {}
        newest: dict[str, LoggedEvent] = {}
        for change in self.precision_changes:
            for module in change.modules or ("",):
                first.setdefault(module, change.before)
                newest[module] = change
        return {module: change for module, change in newest.items() if change.after != first[module]}

    def take(self, event: AmpEvent) -> None:
        """Takes in an event as a session has it."""
        of_log = {"event": event.kind.value, "cause": event.cause and event.cause.value, "run_id": "", "timestamp": ""}
        self._add({**event.figures, **vars(event), **of_log})

    def add(self, line: Mapping[str, Any]) -> None:
        """Takes in one line of the log. Fields that it does not know are left alone.

        Raises:
            StateError: a field has a type that it cannot have.
        """
        self.lines += 1
        try:
            self._add({**line, **{name: line[former] for former, name in _NAMES_OF_0_1.items() if former in line}})
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise StateError(
                f"{self.path}: line {self.lines} is not what hf_amp writes ({error}); it was changed, or comes from a "
                f"version that this one cannot read{self._written_by()}."
            ) from error

    def _written_by(self) -> str:
        wrote, here = self.facts.get("versions", {}).get("hf_amp"), str(sys.modules["hf_amp"].__version__)
        return f": hf_amp {wrote} has written it, and this is {here}" if wrote and wrote != here else ""

    def _add(self, line: dict[str, Any]) -> None:
        kind = line["event"] = _NAMES_OF_0_1.get(line["event"], line["event"])
        if kind == EventKind.TRAINING_STARTED:
            self._begin(line)
        self.run_id, self.newest = str(line["run_id"]), str(line["timestamp"])
        self.started = self.started or self.newest
        self.newest_step = max(self.newest_step, line["step"])
        if kind in (EventKind.METRICS, EventKind.TRAINING_ENDED):
            self._add_figures(line)
            self.ended = self.ended or kind == EventKind.TRAINING_ENDED
        elif kind == EventKind.STEP_SKIPPED:
            scale = line.get("before")
            cause = str(line.get("cause") or "UNKNOWN")
            self.skips[cause].add(line["step"], float(scale) if is_real(scale) else math.nan)
        elif kind == EventKind.PRECISION_CHANGED and line.get("before") != line.get("after"):
            self.precision_changes.append(LoggedEvent.of(line))
            _bound(self.precision_changes)
        if kind in _INCIDENTS:
            self._add_incident(LoggedEvent.of(line))
        self._check_names()

    def _begin(self, line: Mapping[str, Any]) -> None:
        """Training starts, in this process: from the beginning, or after the steps that a checkpoint has behind it."""
        completed = line["step"]
        if self.what_ran and completed == 0:
            anew = RunHistory(self.name, self.path, former_runs=self.former_runs + 1, lines=self.lines)
            vars(self).update(vars(anew))
        elif completed:
            self._cut_after(completed)
            self.resumed_at.append(completed)
            _bound(self.resumed_at)
        self.ended = False
        self.precision = str(line.get("precision", ""))
        self.config = dict(line.get("config", {}))
        self.facts = {
            name: line[name] for name in ("model", "device", "settings", "versions", "process") if name in line
        }
        self.what_ran = str(line.get("message", "")).partition(": ")[2].rstrip(".")

    def _cut_after(self, step: int) -> None:
        by_module = [series for modules in self.modules.values() for series in modules.values()]
        occurrences = [incident.occurrences for incident in self._groups.values()]
        for series in (*self.figures.values(), *by_module, *self.skips.values(), *occurrences):
            series.cut_after(step)
        ended = EventKind.RANKS_PARTED  # which a run that goes on has behind it
        self._groups = {key: each for key, each in self._groups.items() if each.count and each.event != ended}
        self.precision_changes = [change for change in self.precision_changes if change.step <= step]
        self.newest_step = step

    def _add_figures(self, line: Mapping[str, Any]) -> None:
        for name, value in line.items():
            if name in _NO_FIGURES:
                continue
            if name in _MODULE_FIGURES:
                for module, figure in value.items() if isinstance(value, Mapping) else ():
                    if (number := _number(figure)) is not None:
                        self.modules[name][module].add(line["step"], number)
            elif is_real(value):
                self.figures[name].add(line["step"], value)
            elif name in ("loss", "eval_loss") and (number := _number(value)) is not None:  # "nan" is worth a point
                self.figures[name].add(line["step"], number)

    def _add_incident(self, event: LoggedEvent) -> None:
        key = (event.event, event.cause, event.modules)
        if key not in self._groups and len(self._groups) >= LARGEST_GROUPS:
            event = dataclasses.replace(event, modules=("and others",))
            key = (event.event, event.cause, event.modules)
        alike, newest = self._groups.get(key), vars(event)
        if alike and is_real(alike.before):
            newest = newest | {"before": alike.before}  # a row shows the first value and the newest
        occurrences = alike.occurrences if alike else Series(STEPS_KEPT_BY_INCIDENT)
        occurrences.add(event.step)
        self._groups[key] = Incident(**newest, occurrences=occurrences)

    def _check_names(self) -> None:
        groups: list[tuple[Mapping[str, Any], int]] = [(self.figures, MOST_NAMES), (self.skips, MOST_NAMES)]
        for names, most in [*groups, *((modules, MOST_MODULES) for modules in self.modules.values())]:
            if len(names) > most:
                raise ValueError(f"more than {most:,} names")


def _number(value: Any) -> float | None:
    """A figure as a log has it, where "nan" and "inf" are words; None for what is none."""
    return float(value) if is_real(value) or value in ("nan", "inf", "-inf") else None


def _bound(entries: list[Any]) -> None:
    """Drops one from the middle where there are too many: the first and the newest say how it began and how it is."""
    if len(entries) > CHANGES_KEPT:
        del entries[CHANGES_KEPT // 2]
