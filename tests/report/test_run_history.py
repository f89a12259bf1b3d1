"""A run's history is what its log says, in bounded memory."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from hf_amp import StateError
from hf_amp.report.reader import LARGEST_GROUPS, POINTS_KEPT, RunHistory, Series, this_process

_seconds = itertools.count()


def line(event: str, step: int, **fields: Any) -> dict[str, Any]:
    """A line of a log, a second after the one before."""
    stamp = f"2026-01-01T00:{next(_seconds) // 60 % 60:02d}:00.000000Z"
    return {"timestamp": stamp, "event": event, "run_id": "abc", "rank": 0, "step": step, **fields}


def started(step: int = 0, **facts: Any) -> dict[str, Any]:
    message = "training starts: FP16 somewhere."
    return line("training_started", step, message=message, precision="MIXED", config={"seed": 1}, **facts)


def skipped(step: int, cause: str = "SCALE", **fields: Any) -> dict[str, Any]:
    fields = {"message": f"at {step}", **fields}
    return line("step_skipped", step, cause=cause, before=4.0, after=2.0, **fields)


def history(*lines: dict[str, Any]) -> RunHistory:
    run = RunHistory("run", Path("log"))
    for each in lines:
        run.add(each)
    return run


def test_figures_are_kept_over_time() -> None:
    """Every number of a metrics line is a point; what is text or a switch is none."""
    run = history(started(), *(line("metrics", s, loss=5.0 - s, scale=4.0, note="x", on=True) for s in (1, 2)))
    assert {name: list(series) for name, series in run.figures.items()} == {
        "loss": [(1, 4.0), (2, 3.0)],
        "scale": [(1, 4.0), (2, 4.0)],
    }
    assert run.latest == {"loss": 3.0, "scale": 4.0}
    assert (run.what_ran, run.precision, run.newest_step) == ("FP16 somewhere", "MIXED", 2)


def test_a_loss_that_is_not_finite_is_a_point_too() -> None:
    """JSON has no infinity, so the log says it in words."""
    run = history(started(), line("metrics", 1, loss="nan"), line("metrics", 2, loss="inf"))
    assert [str(value) for value in run.figures["loss"].values] == ["nan", "inf"]


def test_alike_incidents_are_one() -> None:
    """Kind, cause and modules tell incidents apart; steps and times are those of all, the message is the newest."""
    run = history(
        started(), skipped(1), skipped(2), skipped(3, "ACTIVATION", modules=["a"]), skipped(9), skipped(9, "ACTIVATION")
    )
    reported = [(i.cause, i.modules, i.first_step, i.last_step, i.count, i.message) for i in run.incidents]
    assert reported == [
        ("SCALE", (), 1, 9, 3, "at 9"),
        ("ACTIVATION", ("a",), 3, 3, 1, "at 3"),
        ("ACTIVATION", (), 9, 9, 1, "at 9"),
    ]
    assert run.skipped_by_cause == {"SCALE": 3, "ACTIVATION": 2}


def test_the_number_of_incidents_that_are_told_apart_is_bounded() -> None:
    """A run in which every step blames another module does not fill the memory."""
    run = history(started(), *(skipped(s, modules=[f"m{s}"]) for s in range(1, 2 * LARGEST_GROUPS)))
    assert len(run.incidents) == LARGEST_GROUPS + 1
    assert sum(incident.count for incident in run.incidents) == 2 * LARGEST_GROUPS - 1


def test_a_resumed_run_goes_on_from_its_checkpoint() -> None:
    """What was logged between the checkpoint and the kill is replaced by what was logged after it."""
    run = history(
        started(),
        *(line("metrics", s, loss=float(s)) for s in (1, 2, 3, 4)),
        skipped(2),
        skipped(4),
        started(3),
        line("metrics", 4, loss=40.0),
    )
    assert list(run.figures["loss"]) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert run.skipped_by_cause == {"SCALE": 1}
    assert (run.resumed_at, run.former_runs) == ([3], 0)


def test_a_resumed_run_counts_what_it_does_anew_once() -> None:
    """Skips at 2 and 7, a resume from 6 and a skip at 9 are two, at 2 and 9; what was only at 7 is gone."""
    run = history(started(), skipped(2), skipped(7), skipped(7, "INPUT"), started(6), skipped(9))
    (incident,) = run.incidents
    assert (incident.first_step, incident.last_step, incident.count) == (2, 9, 2)
    assert run.skipped_by_cause == {"SCALE": 2}


def test_two_skips_of_one_step_are_two() -> None:
    """Two optimizers may skip at one step; a resume from before it forgets both."""
    run = history(started(), skipped(2), skipped(5), skipped(5))
    assert run.skipped_by_cause == {"SCALE": 3}
    run.add(started(3))
    assert run.skipped_by_cause == {"SCALE": 1}
    assert [incident.count for incident in run.incidents] == [1]


def test_a_run_begun_anew_in_the_same_folder_replaces_the_former() -> None:
    """Nothing of the first run is in the second, but it is counted."""
    run = history(started(), skipped(5), line("training_ended", 9, scale=1.0), started(), line("metrics", 1, loss=2.0))
    assert (run.former_runs, run.incidents, list(run.figures), run.ended) == (1, [], ["loss"], False)
    assert run.newest_step == 1


def test_figures_by_module_are_kept_by_module() -> None:
    """Each module has its own course, and they are no figures of the run."""
    run = history(
        started(),
        *(
            line("metrics", s, module_headroom_bits={"a": s, "b": 2 * s}, module_activation_amax={"a": "inf"})
            for s in (1, 2)
        ),
    )
    assert {name: list(series) for name, series in run.modules["module_headroom_bits"].items()} == {
        "a": [(1, 1.0), (2, 2.0)],
        "b": [(1, 2.0), (2, 4.0)],
    }
    assert dict(run.figures) == {}


def changed(step: int, before: str, after: str, *modules: str) -> dict[str, Any]:
    return line("precision_changed", step, before=before, after=after, modules=list(modules), message="because")


def test_what_is_in_another_precision_now_is_known() -> None:
    """Modules that came back are not among them; the newest change of each counts."""
    run = history(
        started(), changed(1, "MIXED", "FP32", "a", "b"), changed(5, "FP32", "MIXED", "a"), changed(7, "MIXED", "BF16")
    )
    assert {module: change.after for module, change in run.changed_modules.items()} == {"b": "FP32", "": "BF16"}


def test_a_change_that_changes_nothing_is_none() -> None:
    """A choice that ends with the candidate that ran last is logged, from FP32 to FP32; its sentence is still shown."""
    run = history(started(), changed(12, "MIXED", "FP32"), changed(23, "FP32", "FP32"))
    assert [change.step for change in run.precision_changes] == [12]
    assert [incident.last_step for incident in run.incidents] == [23]


def test_a_line_that_hf_amp_does_not_write_is_a_clear_error() -> None:
    """A changed or foreign line names the file and where in it."""
    for wrong in (line("training_started", 0, config=[1]), line("step_skipped", 1, modules=3)):
        with pytest.raises(StateError, match="log: line 1 is not what hf_amp writes"):
            history(wrong)


def test_repeated_incidents_show_the_first_value_and_the_newest() -> None:
    """The scale of three skips, from before the first to after the last."""
    run = history(
        started(), *(line("step_skipped", n, cause="SCALE", before=2.0**-n, after=2.0 ** -(n + 1)) for n in (1, 2, 3))
    )
    (incident,) = run.incidents
    assert (incident.count, incident.before, incident.after) == (3, 0.5, 0.0625)


def test_a_bad_value_loses_that_value_alone() -> None:
    """Neither the run nor the other figures of the line."""
    bad = line(
        "metrics", 1, module_headroom_bits=3, loss="three", scale=4.0, module_activation_amax={"a": "x", "b": 2.0}
    )
    run = history(started(), bad)
    assert dict(run.latest) == {"scale": 4.0}
    assert {name: list(series) for name, series in run.modules["module_activation_amax"].items()} == {"b": [(1, 2.0)]}


def test_a_log_of_another_version_says_which() -> None:
    """Where it cannot be read, the error names the version that has written it, and this one."""
    with pytest.raises(StateError, match=r"hf_amp 9\.0 has written it, and this is 0\."):
        history(started(versions={"hf_amp": "9.0"}), line("step_skipped", 1, modules=3))


def test_a_run_is_running_while_its_process_is() -> None:
    """And killed where that has gone without a word; of another machine's nothing is known."""
    here = this_process()
    for process, state in (
        (here, "running"), ({**here, "started": 5.0}, "killed"), ({**here, "machine": "elsewhere"}, "unfinished"),
        ({}, "unfinished"),
    ):  # fmt: skip
        run = history(started(process=process), line("metrics", 1, loss=1.0))
        assert run.state == state
    run.add(line("training_ended", 1))
    assert run.state == "finished"


def test_an_event_of_a_later_version_is_left_alone() -> None:
    """Unknown events and fields neither raise nor count."""
    run = history(started(), line("of_the_future", 3, strange={"a": [1]}))
    assert (run.incidents, run.newest_step) == ([], 3)


def test_a_long_series_is_thinned_and_keeps_its_extremes() -> None:
    """Bounded, in order, with the first, the newest, the highest and the lowest point; all are counted."""
    for points in (10, POINTS_KEPT - 1, POINTS_KEPT, 5 * POINTS_KEPT):
        series = Series()
        for step in range(points):
            series.add(step, {points // 3: 1e6, points // 2: -1e6}.get(step, step % 7))
        assert series.points == points
        assert len(series) <= POINTS_KEPT
        assert (len(series) == points) == (points < POINTS_KEPT)
        assert list(series.steps) == sorted(set(series.steps))
        assert (max(series.values), min(series.values)) == (1e6, -1e6)
        assert (series.steps[-1], series.values[-1]) == (points - 1, (points - 1) % 7)
        series.cut_after(points // 2)
        assert series.points == points // 2 + 1


def test_figures_of_version_0_1_have_the_names_of_now() -> None:
    """A metric that hf_amp 0.1 wrote under another name is read under its name of now, and under that alone."""
    run = history(started(), line("metrics", 4, transitions=2, applied_steps=4), line("hopeless", 4, message="-"))
    assert dict(run.figures["precision_changes"]) == {4: 2.0}
    assert "transitions" not in run.figures
    assert [incident.event for incident in run.incidents] == ["stalled"]
