"""What a Trainer's run looks like in W&B, MLflow and Trackio, read back from what they write on the machine itself."""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_amp import MixedPrecisionCallback
from hf_amp.monitoring.metrics import NAMES
from tests.integrations.trainers import OverflowAt, regression_trainer

pytestmark = pytest.mark.usefixtures("fresh_accelerator_state")


def run(folder: Path, tracker: str) -> MixedPrecisionCallback:
    """Six steps of which the third is skipped, logged at every step."""
    callback = MixedPrecisionCallback(init_scale=1024.0)
    regression_trainer(folder, callback, OverflowAt(3), fp16=True, report_to=tracker, run_name="run").train()
    return callback


def expected(callback: MixedPrecisionCallback) -> set[str]:
    """The metrics that the session knows, by README's names."""
    assert callback.session is not None
    return {f"amp/{name}" for name in callback.session.metrics() if name in NAMES}


def records_of(data: bytes) -> Iterator[bytes]:
    """The records of a W&B run file: after 7 bytes, blocks of 32 KiB of LevelDB's log format (checksum, length, type, part)."""
    whole, at = b"", 7
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:  # the rest of a block, which holds no header
            at += 2**15 - at % 2**15
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole one, or the last part
            yield whole
            whole = b""


def test_wandb_offline_has_all_metrics_and_the_incident(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its run file: README's names behind `train/`, at every step, and the words of the skip as text."""
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    callback = run(tmp_path, "wandb")
    wandb.finish()
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = tmp_path.rglob("*.wandb")
    rows = []
    for data in records_of(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.history.item:
            rows.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
    names = {name for row in rows for name in row}
    assert {f"train/{name}" for name in expected(callback)} <= names
    scales = [(row["train/global_step"], row["train/amp/scale"]) for row in rows if "train/amp/scale" in row]
    assert scales == [(1, 1024.0), (2, 1024.0), (3, 512.0), (4, 512.0), (5, 512.0), (6, 512.0)]
    assert [row["train/amp_incident"] for row in rows if "train/amp_incident" in row] == [
        "step 3: step_skipped (SCALE)"
    ]


def test_mlflow_gets_numbers_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """README's names as they are, and nothing that its callback warns of."""
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    with caplog.at_level(logging.WARNING):
        callback = run(tmp_path, "mlflow")
    assert "MLflow's log_metric() only accepts" not in caplog.text
    runs: list[Any] = mlflow.search_runs(output_format="list", search_all_experiments=True)
    assert expected(callback) <= runs[0].data.metrics.keys()
    history = mlflow.MlflowClient().get_metric_history(runs[0].info.run_id, "amp/scale")
    assert [(point.step, point.value) for point in history][2:4] == [(3, 512.0), (4, 512.0)]


def test_trackio_has_all_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """README's names behind `train/`, in its database."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="trackio is not installed")
    callback = run(tmp_path, "trackio")
    import sqlite3

    (file,) = (tmp_path / "trackio").rglob("*.db")
    with sqlite3.connect(file) as database:
        rows = [json.loads(row) for (row,) in database.execute("select metrics from metrics")]
    names = {name for row in rows for name in row}
    assert {f"train/{name}" for name in expected(callback)} <= names
