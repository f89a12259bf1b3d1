"""One of two processes that meet random faults, some of them on one rank alone. Prints a JSON line with what both saw."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import warnings

import torch.distributed as dist

from tests.fallback.random_faults import Outcome, run
from tests.rank_end import leave_together


def main() -> None:
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    ran: list[Outcome | None] = [run(seed, rank) for seed in range(int(sys.argv[1]))]
    gathered: list[list[Outcome | None]] = [[], []]
    dist.all_gather_object(gathered, ran)
    if rank == 0:
        print(json.dumps([[it and dataclasses.asdict(it) for it in of_rank] for of_rank in gathered]))
    leave_together()


if __name__ == "__main__":
    main()
