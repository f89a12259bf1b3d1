"""What hf_amp saved and logged at commit 76f9429 loads, and means what it meant there.

The files are in `data/at_76f9429`, beside the script that made them and `expected.json`, which holds what hf_amp said there
on loading each.
"""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

# The only names of hf_amp's own modules here; whoever moves them changes this.
from hf_amp.report.reader import read_run
from hf_amp.report.verdict import verdict_on
from tests.data.at_76f9429 import runs
from tests.each import for_each

NEW_EVENTS: dict[str, str] = {"hopeless": "stalled", "statistics_put_back": "buffers_restored"}
"""Kind of an event, as it was called → as it is called now; those that are not here have kept their names."""
NEW_METRICS: dict[str, str] = {"transitions": "precision_changes"}
"""The same for metrics."""
NEW_LEVELS: dict[str, str] = {}
"""The same for levels of a verdict."""

DATA = Path(__file__).resolve().parent / "data" / "at_76f9429"
EXPECTED: dict[str, dict[str, Any]] = json.loads((DATA / "expected.json").read_text(encoding="utf-8"))

pytestmark = pytest.mark.usefixtures("fresh_accelerator_state")


def in_new_names(said: Any, key: str = "") -> Any:
    """`said`, as of 76f9429, in the names of now."""
    if key in ("metrics", "latest", "module_figures"):
        return {NEW_METRICS.get(name, name): value for name, value in said.items()}
    if key == "events":
        return [[step, NEW_EVENTS.get(kind, kind), *rest] for step, kind, *rest in said]
    if key == "event":
        return NEW_EVENTS.get(said, said)
    if key == "level":
        return NEW_LEVELS.get(said, said)
    if isinstance(said, dict):
        return {name: in_new_names(value, name) for name, value in said.items()}
    return [in_new_names(item) for item in said] if isinstance(said, list) else said


def assert_same(found: dict[str, Any], said: dict[str, Any], where: str = "") -> None:
    """Everything in `said` is found, and nothing besides but metrics that are new. Trained numbers may be rounded."""
    for name, value in in_new_names(said).items():
        if name in ("metrics", "latest"):
            assert {n: found[name].get(n) for n in value} == value, f"{where}{name}"
        elif name == "then":
            assert_same(found[name], said[name], f"{where}then: ")
        elif name == "end":  # skips that are not the scale's no longer start the count of clean steps anew
            assert {**found[name], "growth_tracker": 0} == {**value, "growth_tracker": 0}, f"{where}{name}"
        elif name == "events" and any("UNKNOWN" in event for event in value):
            # What was UNKNOWN is a derivative now, and lets the way back begin earlier.
            assert [kind for _, kind, *_ in found[name]] == [kind for _, kind, *_ in value], f"{where}{name}"
        elif name in ("losses", "weights_after_20_steps"):
            assert found[name] == pytest.approx(value, rel=2e-3), f"{where}{name}"
        else:
            assert found[name] == value, f"{where}{name}"
    assert set(found) == set(said)


def facts_of(run: Path) -> dict[str, Any]:
    history = read_run(run)
    return runs.log_facts(history, verdict_on(history).level.value)


@for_each("name", runs.SCALERS)
def test_a_scaler_goes_on(name: str) -> None:
    """Scale, counters, growth tracker and options are those that were saved, and the scale goes on as it would have gone
    on; what was saved with hysteresis and a tolerance loads without these options. Where the host knows a verdict a step late,
    the scale grows a step later than it did then.
    """
    found = runs.loaded_scaler(DATA / f"scaler_{name}.pt", runs.SCALERS[name])
    expected = dict(EXPECTED["scalers"][name])
    if name == "PERFORMANCE_OPTIMIZED":
        scales = expected["goes_on"]
        expected["goes_on"] = [scales[0], *(min(pair) for pair in itertools.pairwise(scales))]
    assert_same(found, expected)


def test_master_weights_go_on() -> None:
    """FP32 master weights in an optimizer's state load to the last bit, and move the FP16 parameters from there."""
    found = runs.loaded_half_run(DATA / "fp16_master_weights.pt")
    assert_same(found, EXPECTED["optimizers"]["fp16_master_weights"])


@for_each("precision", ["fp16", "bf16"])
@for_each("saved", ["accelerate_fp16", "accelerate_bf16"])
def test_an_accelerator_goes_on(saved: str, precision: str) -> None:
    """`load_state` gives scale, counters, figures and plan in the precision of the checkpoint, counters in another, and the
    run goes on to what it would have come to: modules in FP32 are tried in FP16 again when it was their time.
    """
    found = runs.loaded_loop(DATA / saved, precision)
    assert_same(found, EXPECTED["accelerate"][f"{saved} loaded in {precision}"])


@pytest.mark.parametrize("restore", [False, True], ids=["ours", "restored by Trainer"])
def test_a_trainer_resumes(tmp_path: Path, restore: bool) -> None:
    """From the checkpoint's scale, counters, figures and plan, to the losses that it had; also where the Trainer makes the
    callback anew from the options in the checkpoint, whatever has become of these. Its log goes on in the same file.
    """
    shutil.copytree(DATA / "trainer_fp16", tmp_path / "trainer_fp16")
    found = runs.resumed_trainer(tmp_path / "trainer_fp16", restore)
    expected = EXPECTED["trainers"]["trainer_fp16"]
    then, expected_then = found.pop("then"), dict(expected)["then"]
    assert_same(found, {name: value for name, value in expected.items() if name != "then"})
    # What overflows in step 8 has another cause since FP16 on a CPU is that of a device.
    assert [event[:2] for event in then["events"]][:1] == [event[:2] for event in expected_then["events"]]
    assert then["end"]["applied_steps"] == expected_then["end"]["applied_steps"]
    assert then["losses"] == pytest.approx(expected_then["losses"], rel=1e-4)
    log = facts_of(tmp_path / "trainer_fp16")
    expected_log = EXPECTED["trainers"]["its log after resuming"]
    assert {name: log[name] for name in ("resumed_at", "newest_step")} == {
        name: expected_log[name] for name in ("resumed_at", "newest_step")
    }


@pytest.mark.parametrize(
    ("name", "options"), [("manager_fp16", {}), ("manager_dynamic", {"precision_mode": "DYNAMIC"})]
)
def test_a_manager_goes_on(name: str, options: dict[str, Any]) -> None:
    """`load` gives epochs, scale, counters, figures, plan and statistics; with DYNAMIC, the precision that was chosen."""
    found = runs.loaded_manager(DATA / f"{name}.pt", **options)
    assert_same(found, EXPECTED["managers"][name])


@for_each("name", EXPECTED["logs"])
def test_a_log_tells_what_it_told(name: str) -> None:
    """Skips, changes of precision, incidents, figures and how the run is, as they were read from the log."""
    assert_same(facts_of(DATA / name), EXPECTED["logs"][name])


def test_every_file_is_loaded() -> None:
    """Each saved state and log in the folder has its line in `expected.json`."""
    states = {path.stem.removeprefix("scaler_") for path in DATA.glob("*.pt")}
    said = [*EXPECTED["scalers"], *EXPECTED["optimizers"], *EXPECTED["managers"]]
    assert states == set(said)
    logs = {path.relative_to(DATA).as_posix() for path in DATA.rglob("*.jsonl")}
    assert logs == set(EXPECTED["logs"])
