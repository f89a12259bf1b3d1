"""Files of saved state, read without running code that is in them."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from hf_amp.errors import StateError


def read(path: str | Path) -> Any:
    """The content of a file that `torch.save` wrote, on the CPU.

    `torch.load` does not look at the checksums that `torch.save` writes, so that a flipped bit would pass for another
    number; here they are compared, unless `torch.serialization.set_crc32_options` says that none are written.

    Raises:
        StateError: the file is damaged, cut off, something else, or would run code.
    """
    try:
        if torch.serialization.get_crc32_options() and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"the checksum of {damaged} in it is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle and zipfile raise unrelated trees
        why = f"{type(error).__name__}: {error}".split("\n")[0].split(". ")[0]
        raise StateError(
            f"{path}: cannot be read as a saved state ({why}): it is damaged, cut off or something else. Load another "
            "checkpoint."
        ) from error
