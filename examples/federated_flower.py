"""Federated averaging by Flower: each client a stock Trainer with hf_amp, in a precision of its own; the server averages in FP32.

Three processes on this machine learn scikit-learn's digits, each its own third; nothing is downloaded, nothing leaves the loopback:

    pip install flwr
    python examples/federated_flower.py
    python examples/federated_flower.py --unguarded BF16

A client with hf_amp skips a bad batch. `--unguarded` takes hf_amp from one whose data holds a NaN: its weights become NaN, and the
server leaves that update out of the average and names the client.
"""

from __future__ import annotations

import argparse
import multiprocessing.connection
import os
import signal
import socket
import tempfile
import threading
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, set_seed

from hf_amp import MixedPrecisionCallback

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # by default Flower reports each start to its makers

Weights = list[np.ndarray]
PRECISIONS: dict[str, dict[str, bool]] = {"FP16": {"fp16": True}, "BF16": {"bf16": True}, "FP32": {}}
"""Name of a client, which is its precision → options of its Trainer."""
HELD_OUT = 300
NAN_ROW = 7


class Digits(nn.Module):
    """Two layers over 64 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.output = nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.output(self.hidden(x).relu())
        return (
            {"logits": logits}
            if labels is None
            else {"loss": nn.functional.cross_entropy(logits.float(), labels), "logits": logits}
        )


def initial_model() -> Digits:
    set_seed(0)
    return Digits()


def weights_of(model: nn.Module) -> Weights:
    """In FP32, whatever the client has trained in."""
    return [p.detach().float().cpu().numpy() for p in model.parameters()]


def load_weights(model: nn.Module, weights: Weights) -> None:
    with torch.no_grad():
        for p, w in zip(model.parameters(), weights, strict=True):
            p.copy_(torch.from_numpy(np.array(w)))


def rows() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    return torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)


def train_round(name: str, weights: Weights, steps: int, guarded: bool = True) -> tuple[Weights, dict[str, Any]]:
    """One client's round from the server's weights, on its own third, of which one row is NaN; weights, and what was skipped."""
    x, labels = rows()
    mine = slice(list(PRECISIONS).index(name), -HELD_OUT, len(PRECISIONS))
    x, labels = x[mine].clone(), labels[mine]
    x[NAN_ROW] = torch.nan
    model = initial_model()
    load_weights(model, weights)
    callback = MixedPrecisionCallback()
    Trainer(
        model,
        TrainingArguments(
            tempfile.mkdtemp(), use_cpu=True, max_steps=steps, per_device_train_batch_size=32, learning_rate=5e-3,
            save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=steps, **PRECISIONS[name],
        ),
        train_dataset=Dataset.from_dict({"x": x, "labels": labels}).with_format("torch"),
        callbacks=[callback] if guarded else [],
    ).train()  # fmt: skip
    skipped = 0.0
    if callback.session is not None:
        skipped = callback.session.metrics()["skipped_steps"]
        callback.session.detach()
    return weights_of(model), {"client": name, "skipped": skipped}


def average(updates: dict[str, tuple[Weights, int]]) -> tuple[Weights, list[str]]:
    """Mean of the clients' weights by their number of rows, summed in FP64 and given in FP32, and the clients left out of it.

    Raises:
        ValueError: no update is finite.
    """
    left_out = [name for name, (weights, _) in updates.items() if not all(np.isfinite(w).all() for w in weights)]
    kept = [update for name, update in updates.items() if name not in left_out]
    if not kept:
        raise ValueError(f"no client's update is finite ({', '.join(left_out)}): look at their data.")
    total = sum(count for _, count in kept)
    shares = [[w.astype(np.float64) * (count / total) for w in weights] for weights, count in kept]
    return [np.sum(each, axis=0).astype(np.float32) for each in zip(*shares, strict=True)], left_out


def accuracy(weights: Weights) -> float:
    """On the rows that no client has."""
    x, labels = rows()
    model = initial_model()
    load_weights(model, weights)
    with torch.no_grad():
        right = model(x[-HELD_OUT:])["logits"].argmax(1) == labels[-HELD_OUT:]
    return float(right.float().mean())


def serve(address: str, rounds: int) -> None:
    """Flower's server: its strategy gathers the updates, `average` makes the next weights of them."""
    import flwr
    from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays

    class FiniteAverage(flwr.server.strategy.FedAvg):
        def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
            updates = {
                str(fit.metrics["client"]): (parameters_to_ndarrays(fit.parameters), fit.num_examples)
                for _, fit in results
            }
            weights, left_out = average(updates)
            named = "; ".join(f"{fit.metrics['client']} skipped {fit.metrics['skipped']:.0f}" for _, fit in results)
            out = f"; left out, not finite: {', '.join(left_out)}" if left_out else ""
            print(f"round {server_round}: {100 * accuracy(weights):.1f}% of the digits right; {named}{out}", flush=True)
            return ndarrays_to_parameters(weights), {}

    everyone = len(PRECISIONS)
    strategy = FiniteAverage(
        fraction_evaluate=0.0, min_fit_clients=everyone, min_available_clients=everyone,
        initial_parameters=ndarrays_to_parameters(weights_of(initial_model())),
    )  # fmt: skip
    flwr.server.start_server(
        server_address=address, config=flwr.server.ServerConfig(num_rounds=rounds), strategy=strategy
    )


def join(address: str, name: str, steps: int, guarded: bool) -> None:
    """One client, until the server ends."""
    import flwr

    class Client(flwr.client.NumPyClient):
        def fit(self, parameters: Weights, config: dict[str, Any]) -> Any:
            weights, metrics = train_round(name, parameters, steps, guarded)
            return weights, 500, metrics

    flwr.client.start_client(server_address=address, client=Client().to_client())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="of each client in a round")
    parser.add_argument("--unguarded", choices=list(PRECISIONS), help="a client that trains without hf_amp")
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    clients = [
        multiprocessing.Process(target=join, args=(address, name, options.steps, name != options.unguarded))
        for name in PRECISIONS
    ]
    for client in clients:  # before anything computes: a process that has computed may not be copied
        client.start()
    served = threading.Event()

    def interrupt() -> None:
        """Flower's server would wait for a client that has failed."""
        multiprocessing.connection.wait([client.sentinel for client in clients])
        if not served.is_set() and any(client.exitcode for client in clients):
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    try:
        serve(address, options.rounds)
    finally:
        served.set()
        for client in clients:
            client.terminate()
            client.join()


if __name__ == "__main__":
    main()
