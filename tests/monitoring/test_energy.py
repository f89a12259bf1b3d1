"""Joules an applied step, from RAPL's files as Linux writes them, and absent where nothing counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from hf_amp import AmpSession
from hf_amp.monitoring import energy
from hf_amp.monitoring.energy import EnergyMeter
from hf_amp.report.reader import read_run


def zone(folder: Path, name: str, microjoules: int, limit: int = 1_000_000_000) -> Path:
    """A zone of powercap; gives its counter."""
    (folder / name).mkdir(parents=True)
    (folder / name / "max_energy_range_uj").write_text(f"{limit}\n")
    counter = folder / name / "energy_uj"
    counter.write_text(f"{microjoules}\n")
    return counter


def test_packages_are_added_up_and_wrap_around(tmp_path: Path) -> None:
    """Zones inside of a package (cores, memory) are part of it, and do not count twice; steps before do not count."""
    first = zone(tmp_path, "intel-rapl:0", 5_000_000)
    second = zone(tmp_path, "intel-rapl:1", 999_000_000, limit=1_000_000_000 - 1)
    inner = zone(tmp_path, "intel-rapl:0:0", 1_000_000)
    meter = EnergyMeter("cpu", 10, tmp_path)
    assert meter.metrics(10) == {}
    first.write_text("9000000")  # 4 J more
    inner.write_text("4000000")
    second.write_text("1000000")  # 1 J to the end, and 1 J
    assert meter.metrics(12) == {"joules_per_step": pytest.approx(3.0)}
    second.write_text("3000000")
    assert meter.metrics(14) == {"joules_per_step": pytest.approx(2.0)}


def test_a_counter_that_goes_away_ends_no_run(tmp_path: Path) -> None:
    """As where rights are taken back: the metric is absent from then on."""
    counter = zone(tmp_path, "intel-rapl:0", 1_000_000)
    meter = EnergyMeter("cpu", 0, tmp_path)
    counter.unlink()
    assert meter.metrics(1) == {}
    counter.write_text("9000000")
    assert meter.metrics(2) == {}


def test_where_nothing_counts_it_is_absent(tmp_path: Path) -> None:
    """No folder, a counter that cannot be read, and a device without one."""
    assert EnergyMeter("cpu", 0, tmp_path / "nowhere").metrics(1) == {}
    zone(tmp_path, "intel-rapl:0", 1).unlink()
    assert EnergyMeter("cpu", 0, tmp_path).metrics(1) == {}
    assert EnergyMeter("mps", 0).metrics(1) == {}
    if not torch.cuda.is_available():
        assert EnergyMeter("cuda", 0).metrics(1) == {}


@pytest.mark.gpu
def test_a_gpu_counts() -> None:
    """By NVML, where `pynvml` is installed: more than nothing for a second of products."""
    pytest.importorskip("pynvml", reason="needs pynvml, which the extra hf_amp[energy] brings")
    meter = EnergyMeter("cuda", 0)
    x = torch.randn(4096, 4096, device="cuda")
    for _ in range(200):
        x = (x @ x).clamp(-1, 1)
    torch.cuda.synchronize()
    assert meter.metrics(1)["joules_per_step"] > 1


def test_a_session_reports_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In metrics and the log, from which the report takes it."""
    counter = zone(tmp_path / "powercap", "intel-rapl:0", 0)
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "powercap")
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with AmpSession.for_model(model, optimizer, init_scale=8.0) as session:
        session.log_to(tmp_path)
        for step in (1, 2):
            session.scaler.scale(model(torch.ones(2, 4)).float().square().mean()).backward()
            session.scaler.step(optimizer)
            session.scaler.update()
            counter.write_text(str(step * 7_000_000))
            session.log_metrics()
    assert session.metrics()["joules_per_step"] == pytest.approx(7.0)
    assert read_run(tmp_path).latest["joules_per_step"] == pytest.approx(7.0)
