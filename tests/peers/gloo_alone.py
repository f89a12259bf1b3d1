"""DeepSpeed's first run on a CPU compiles a kernel for shared memory, a minute's work and a compiler that gloo does without."""

from __future__ import annotations


def compile_nothing() -> None:
    """Makes DeepSpeed in this process communicate by gloo alone."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
