"""Training on a GPU: speed, memory, synchronisations and energy of hf_amp, beside FP32, BF16 and the stock scaler.

`python -m tests.benchmarks.test_gpu_training --out tests/benchmarks/results`
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks.gpu import measuring, models
from tests.benchmarks.gpu.contenders import accelerated, contenders, modules_to_hold, products
from tests.benchmarks.gpu.expectations import expectations
from tests.benchmarks.gpu.measuring import estimated_saving, facts_of, timed_in_turn
from tests.benchmarks.gpu.models import Subject
from tests.benchmarks.gpu.tries import try_compiled, try_graphed_model
from tests.benchmarks.measuring import write

BATCHES = 4
"""Different ones, which the ways go through."""


def measure(subject: Subject, rows: int, device: torch.device, rounds: int, seconds: float) -> dict[str, Any]:
    """One model at one batch size; see `timed_in_turn`."""
    gc.collect()  # what was attached to the model before lies in cycles
    torch.cuda.empty_cache()
    torch.manual_seed(0)
    model = subject.make().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    batches = [{name: x.to(device) for name, x in subject.batch(rows).items()} for _ in range(BATCHES)]
    ways = contenders(model, optimizer)
    ways["FP32"].step(batches[0])  # makes the optimizer's state, which is resident from now on
    facts = {name: facts_of(way, batches[0], device) for name, way in ways.items()}
    estimate = estimated_saving(ways["FP16 DYNAMIC"], model, optimizer, batches[0])
    figures = timed_in_turn(ways, batches, rows * subject.units_a_row, rounds, seconds)
    for name, way in ways.items():
        figures[name] |= facts[name]
        if way.session is not None:
            way.session.scaler.flush()
            figures[name] |= {"skipped_steps": way.session.scaler.skipped_steps, "plan": way.session.plan.describe()}
            way.session.detach()
    return {
        "rows": rows,
        "unit": subject.unit,
        "units_a_step": rows * subject.units_a_row,
        "parameters": sum(p.numel() for p in model.parameters()),
        "estimate": estimate,
        "ways": figures,
    }


def measure_what_fits(subject: Subject, rows: int, *arguments: Any) -> dict[str, Any]:
    """The same with half of the rows, again and again, where memory does not suffice."""
    while True:
        try:
            return measure(subject, rows, *arguments)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
        rows //= 2  # outside of the handler, whose traceback keeps alive what has filled the memory


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All that there is to measure; what is there so far is written after every case."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result: dict[str, Any] = {"seconds_a_round": options.seconds, "rounds": options.rounds, "cases": {}}
    if device.type == "cuda":
        result["cuda"] = torch.version.cuda
        result["gpu_bytes"] = torch.cuda.get_device_properties(device).total_memory
    cases, started = result["cases"], time.monotonic()
    subjects = models.TINY if options.tiny else models.FULL
    for subject in subjects:
        for rows in subject.rows if subject.name in (options.models or [s.name for s in subjects]) else ():
            if time.monotonic() - started > 60 * options.minutes:
                result["not measured"] = "the rest: no time was left"
                break
            label = f"{subject.name}, {rows} rows"
            cases[label] = measure_what_fits(subject, rows, device, options.rounds, options.seconds)
            print(f"{label}: {time.monotonic() - started:.0f} s", flush=True)
            result["expectations"] = expectations(cases)
            write("gpu_training", result, options.out)
    shallow = models.TINY[:1] if options.tiny else models.SHALLOW
    result["compiled"] = {s.name: try_compiled(s, device, options.backend) for s in shallow}
    write("gpu_training", result, options.out)
    # Last: a capture that fails may leave the device in a state that nothing else should be measured in.
    result["graphed_model"] = try_graphed_model(device)
    write("gpu_training", result, options.out)
    return result


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(description=__doc__)
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--models", nargs="+", choices=[subject.name for subject in models.FULL])
    command.add_argument("--rounds", type=int, default=6)
    command.add_argument("--seconds", type=float, default=0.3, help="of one way in one round")
    command.add_argument("--minutes", type=float, default=6.0, help="after which no other case is begun")
    command.add_argument("--backend", default="inductor", help="of torch.compile")
    command.add_argument("--tiny", action="store_true", help="tiny models: shows that everything runs, also on a CPU")
    return command


def show(result: dict[str, Any]) -> None:
    for label, case in result["cases"].items():
        print(f"\n{label}: {case['unit']}/s, over FP32, over stock, GB, synchronisations")
        for name, way in case["ways"].items():
            over = [way[f"speed over {base}"]["median"] for base in ("FP32", "FP16 stock")]
            print(
                f"  {name:37}{way['units_per_second']['median']:12,.0f}{over[0]:7.2f}{over[1]:7.3f}"
                f"{way.get('peak_bytes', 0) / 1e9:7.2f}{way['synchronisations_per_step']:7.2f}"
            )
    for expectation in result["expectations"]:
        print(f"{expectation['name']}, wanted {expectation['wanted']}: {expectation['reached']}")
    print({name: result[name] for name in ("compiled", "graphed_model")})


def main() -> None:
    command = parser()
    options = command.parse_args()
    if not (torch.cuda.is_available() or options.tiny):
        command.error("there is no CUDA device; --tiny runs everything small on a CPU")
    show(run(options))


# ---- tests of the benchmark itself ----------------------------------------------------------------------------

pytestmark = pytest.mark.usefixtures("fresh_accelerator_state")


def test_everything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small and short, on whatever device there is: every way of every case has its figures, in a file."""
    for steps in ("WARM_UP_STEPS", "COUNTED_STEPS"):
        monkeypatch.setattr(measuring, steps, 1)
    arguments = ["--out", str(tmp_path), "--tiny", "--rounds", "2", "--seconds", "0", "--backend", "eager"]
    result = run(parser().parse_args(arguments))
    show(result)
    written = json.loads((tmp_path / "gpu_training.json").read_text())
    assert set(result) < set(written)
    assert len(result["cases"]) == 2
    for case in result["cases"].values():
        for way in case["ways"].values():
            assert way["units_per_second"]["median"] > 0
            assert way["speed over FP16 stock"]["median"] > 0
        reads = [case["ways"][name]["synchronisations_per_step"] for name in ("FP16 DYNAMIC", "BF16")]
        # The model's own reads are in both. On a CPU a number that the host holds counts as one, too.
        assert reads[1] < reads[0] <= reads[1] + (1 if torch.cuda.is_available() else 2)
        assert -1 < case["estimate"]["memory_saving_fraction"] < 1
    assert all(len(expectation["measured"]) == 2 for expectation in result["expectations"])
    assert all(compiled["runs"] for compiled in result["compiled"].values()), result["compiled"]
    if not torch.cuda.is_available():
        assert result["graphed_model"]["captured"] is False


def test_the_plan_is_followed() -> None:
    """Half of the modules are in FP32: their outputs, and theirs alone, are not FP16 values."""
    torch.manual_seed(0)
    subject = models.TINY[0]
    model = subject.make()
    way = accelerated(model, torch.optim.AdamW(model.parameters(), fused=True), share=0.5)
    exact = {}

    def note(name: str) -> Any:
        return lambda module, inputs, y: exact.update({name: bool((y == y.half()).all())})

    for name, module in way.session._fallback.runner.named_modules():
        if name in products(model):
            module.register_forward_hook(note(name))
    way.step(subject.batch(4))
    held = {name for name, is_exact in exact.items() if not is_exact}
    assert held == set(modules_to_hold(model, 0.5))
    assert len(held) == round(len(products(model)) / 2)


def test_all_ways_train_the_same_parameters() -> None:
    """Each way moves the one set of parameters by the one optimizer, and leaves the model without a hook."""
    torch.manual_seed(0)
    subject = models.TINY[0]
    model = subject.make()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for name, way in contenders(model, optimizer).items():
        before = [p.detach().clone() for p in model.parameters()]
        way.step(subject.batch(2))
        if way.session is not None:
            way.session.scaler.flush()
        assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)), name
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert len(optimizer.state) == len(list(model.parameters()))


def test_rows_are_halved_where_memory_does_not_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fits is measured, and said; a single row that does not fit is an error."""
    tried = []

    def measure_up_to_2(subject: Subject, rows: int) -> dict[str, Any]:
        tried.append(rows)
        if rows > 2 or subject.name == "too large":
            raise torch.OutOfMemoryError("no room")
        return {"rows": rows}

    monkeypatch.setattr(sys.modules[__name__], "measure", measure_up_to_2)
    assert measure_what_fits(models.TINY[0], 9) == {"rows": 2}
    assert tried == [9, 4, 2]
    with pytest.raises(torch.OutOfMemoryError):
        measure_what_fits(dataclasses.replace(models.TINY[0], name="too large"), 2)


def test_expectations_are_judged_by_their_figures() -> None:
    """Reached, not reached and not measured are told apart; memory is judged by the best case, speed by the worst."""

    def case(speed: float, stored: int | None, reads: float) -> dict[str, Any]:
        bases = ("FP32", "FP32 with TF32", "FP16 stock", "FP16 DYNAMIC")
        figures = {f"speed over {base}": {"median": speed} for base in bases}
        if stored is not None:
            figures["stored_bytes"] = stored
        names = [name for name, _ in _ways()]
        ways = {name: {**figures, "synchronisations_per_step": 1.0} for name in names}
        ways["FP16 PERFORMANCE_OPTIMIZED"]["synchronisations_per_step"] += reads
        if stored is not None:
            ways["FP32"]["stored_bytes"] = 100
        return {"ways": ways}

    def reached(*cases: dict[str, Any]) -> dict[str, Any]:
        reported = expectations({str(index): each for index, each in enumerate(cases)})
        return {expectation["name"]: expectation["reached"] for expectation in reported}

    assert set(reached(case(1.6, 50, 0.0)).values()) == {True}
    assert set(reached(case(0.8, 60, 1.0)).values()) == {False}
    both = reached(case(1.6, 50, 0.0), case(0.8, 60, 1.0))
    assert both.pop("less stored for backward than in FP32") is True
    assert set(both.values()) == {False}
    assert reached(case(1.6, None, 0.0))["less stored for backward than in FP32"] == "not measured"


def _ways() -> Any:
    model = models.TINY[0].make()
    return contenders(model, torch.optim.AdamW(model.parameters(), fused=True)).items()


if __name__ == "__main__":
    main()
