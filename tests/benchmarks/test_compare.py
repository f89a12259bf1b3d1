"""Whether `hf_amp.compare` names the module that was corrupted, and none where the code is equal: 200 and 100 pairs of models.

`OMP_NUM_THREADS=1 python -m tests.benchmarks.test_compare --out tests/benchmarks/results`
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers.utils import logging

from hf_amp.capture import captured, save_capture
from hf_amp.comparison import Setting, compare
from hf_amp.fallback.recorder import RecordedForward
from tests.benchmarks.measuring import Row, parser, write
from tests.corruptions import CORRUPTIONS, EQUAL_CODE, Case, EqualPair, cases, equal_pairs, judged

CORRUPTED, EQUAL, PROCESSES = 200, 100, 4


def from_captures(case: Case, folder: Path) -> str:
    """The verdict on one corruption where only two capture files are compared."""
    model, other, batch, truth = case.models()
    setting = Setting(case.precision)
    random_state = torch.get_rng_state()
    files = []
    for name, its in (("a", model), ("b", other)):
        torch.set_rng_state(random_state)
        forward = RecordedForward(its, (), dict(batch))
        with setting.entered(its) as current:
            files.append(save_capture(captured(forward, current, 1024.0), forward, folder / f"{name}.safetensors"))
    return judged(compare(*files), truth)


def _verdicts(case: Case) -> tuple[str, str | None]:
    """With both models at hand; and, of every third case, from captures alone."""
    verdict, alone = judged(*case.compared()), None
    if case.number % 3 == 0:
        with TemporaryDirectory() as folder:
            alone = from_captures(case, Path(folder))
    print(f"{case}: {verdict}; from captures alone {alone}", flush=True)
    return verdict, alone


def _alarms(pair: EqualPair) -> int:
    found = pair.compared()
    print(f"{pair}: {found.sentence()}", flush=True)
    return not found.agrees or bool(found.state)


def corruptions(some: Sequence[Case], verdicts: Sequence[tuple[str, str | None]]) -> list[Row]:
    """A row a kind of corruption, one for all, and one for all from capture files alone."""
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in (*CORRUPTIONS, "all", "all, from captures alone")}
    for case, (with_models, alone) in zip(some, verdicts, strict=True):
        for kind, verdict in (
            (case.corruption, with_models),
            ("all", with_models),
            ("all, from captures alone", alone),
        ):
            counts[kind][str(verdict)] += verdict is not None
    return [_row("corrupted", kind, its) for kind, its in counts.items()]


def equal_code(some: Sequence[EqualPair], alarms: Sequence[int]) -> list[Row]:
    """A row a kind of equal code, and one for all: how many of them were said to differ."""
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in (*EQUAL_CODE, "all")}
    for pair, alarm in zip(some, alarms, strict=True):
        for kind in (pair.what, "all"):
            counts[kind]["wrong" if alarm else "right"] += 1
    return [_row("equal code", kind, its) for kind, its in counts.items() if its]


def _row(pairs: str, what: str, counts: Mapping[str, int]) -> Row:
    seen = {verdict: counts.get(verdict, 0) for verdict in ("right", "not seen", "wrong")}
    return {
        "pairs": pairs,
        "what": what,
        "tried": sum(seen.values()),
        **{k.replace(" ", "_"): v for k, v in seen.items()},
    }


def main() -> None:
    options = parser().parse_args()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    some, equal = list(cases(CORRUPTED)), list(equal_pairs(EQUAL))
    with get_context("fork").Pool(PROCESSES) as pool:  # before this process has computed anything
        rows = corruptions(some, pool.map(_verdicts, some, 1)) + equal_code(equal, pool.map(_alarms, equal, 1))
    write("compare", {"rows": rows}, options.out)


def test_the_rows_add_up() -> None:
    """Of each kind a corruption, and one pair of equal code: the rows for all are the sum of the others."""
    some = list(cases(7))
    *rows, everything, _ = corruptions(some, [("right", "not seen")] * 6 + [_verdicts(some[6])])
    assert everything["tried"] == sum(row["right"] for row in rows) == everything["right"] == 7
    pairs = list(equal_pairs(2))
    *rows, everything = equal_code(pairs, [_alarms(pairs[0]), 1])
    assert (everything["tried"], everything["right"]) == (2, 1)


if __name__ == "__main__":
    main()
