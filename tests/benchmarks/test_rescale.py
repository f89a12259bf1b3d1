"""Models that overflow in FP16, blown up so that their function stays, and what `rescale_for_fp16` makes of them.

`python -m tests.benchmarks.test_rescale --out tests/benchmarks/results`
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tests.benchmarks.measuring import Row, parser, write
from tests.benchmarks.run_metadata import ROOT
from tests.rescale.families import FAMILIES
from tests.rescale.trials import BITS, FURTHER, Trial, of_architecture, of_family, random_blow_up


def counted(what: str, trials: Iterable[Trial]) -> Row:
    """One row of the table."""
    done = list(trials)
    print(*(trial for trial in done if not trial.times_usual <= 1.5), sep="\n", file=sys.stderr, flush=True)
    safe = [trial for trial in done if trial.safe]
    return {
        "what": what,
        "architectures": len({trial.name for trial in done}),
        "blow_ups": len(done),
        "failed_in_FP16_before": sum(trial.failed_before for trial in done),
        "safe": len(safe),
        "bitwise": sum(trial.bitwise for trial in safe),
        "refused": len(done) - len(safe),
        "wrong": sum(trial.wrong for trial in done),
        "largest_relative_difference": f"{max(trial.apart for trial in safe):.1g}",
        "largest_KL_over_usual": f"{max(trial.times_usual for trial in safe):.3g}",
        "KL_beyond_1.5_times_usual": sum(trial.times_usual > 1.5 for trial in safe),
        "of_these_beyond_all_twins": sum(trial.times_usual > 1.5 and trial.times_chance > 1 for trial in safe),
    }


def trials_of(job: tuple[str, str, dict[str, int]]) -> list[Trial]:
    """One job of a worker: ("family" or "random", name, exponents), or ("architecture", name, {}).

    A family goes through `save_pretrained` and `from_pretrained(dtype=torch.float16)`, random ones do not.
    """
    kind, name, exponents = job
    if kind == "architecture":
        return list(of_architecture(name))
    family = next(f for f in FAMILIES if f.name == name)
    with tempfile.TemporaryDirectory() as folder:
        return [of_family(family, exponents, Path(folder) if kind == "family" else None)]


def large() -> dict[str, float]:
    """CPU seconds and memory for a GPT-2 of 354M parameters whose residual stream leaves the range; run in a process of its own."""
    import torch
    import transformers

    from hf_amp.rescale import rescale_for_fp16

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=1024,
        n_layer=24,
        n_head=16,
        layer_norm_epsilon=1e-5 * 4.0**BITS,
        tie_word_embeddings=False,
        vocab_size=25000,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "wte" in name or "wpe" in name or ".c_proj." in name:
                parameter.mul_(2.0**BITS)
    parameters = sum(p.numel() for p in model.parameters())
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    report = rescale_for_fp16(model, {"input_ids": torch.randint(25000, (1, 128))})
    seconds, peak = time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(report.sentence, before, file=sys.stderr)
    return {
        "parameters": parameters,
        "safe": int(report.safe),
        "seconds": seconds,
        "peak": peak * 1024 / (4 * parameters),
    }


def measured_large() -> list[Row]:
    """The same from a fresh process, whose peak of memory is its own."""
    program = "import json; from tests.benchmarks.test_rescale import large; print(json.dumps(large()))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return [
        {
            "what": "GPT-2, residual stream",
            "parameters": int(found["parameters"]),
            "safe": found["safe"],
            "CPU_seconds": round(found["seconds"], 1),
            "peak_memory_over_FP32_size": round(found["peak"], 2),
        }
    ]


def main() -> None:
    command = parser()
    command.add_argument("--random", type=int, default=1000, help="random blow-ups")
    options = command.parse_args()
    draw = random.Random(0)
    drawn = [random_blow_up(draw) for _ in range(options.random)]
    jobs = {
        "15 families, by hand": [("family", f.name, {way: BITS}) for f in FAMILIES for way in f.symmetries],
        "further architectures": [("architecture", name, {}) for name in FURTHER],
        "random, of the families": [("random", family.name, exponents) for family, exponents in drawn],
    }
    rows = []
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        for what, each in jobs.items():
            rows.append(counted(what, itertools.chain.from_iterable(pool.map(trials_of, each))))
            print(rows[-1], flush=True)
    write("rescale", {"random": options.random, "rows": rows, "details": measured_large()}, options.out)


if __name__ == "__main__":
    main()
