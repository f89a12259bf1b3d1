"""What this process has written to sockets and files, as Linux counts it."""

from __future__ import annotations

from pathlib import Path


def bytes_written() -> int:
    """Bytes that the process has passed to write calls, which is how gloo sends. Source: proc(5), /proc/pid/io."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("wchar")).split()[1])
