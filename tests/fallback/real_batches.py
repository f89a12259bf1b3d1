"""Endless batches of real data for tiny models: help topics as bytes, digits as images, bytes made into sound."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

Batches = Iterator[dict[str, Tensor]]

MASK_BYTE, START_BYTE = 1, 2
"""Bytes that do not occur in the help topics."""

IGNORED = -100
BYTES_A_SOUND = 12
FRAMES_A_BYTE = 4
MEL_BINS = 16


@cache
def help_bytes() -> Tensor:
    """The help topics of CPython, in the order of their names: int64 of shape [about 700,000]."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def blocks(seed: int, count: int, length: int) -> Iterator[Tensor]:
    """Random places of the help topics: int64 of shape [count, length]."""
    text, generator = help_bytes(), torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - length, (count,), generator=generator)
        yield torch.stack([text[start : start + length] for start in starts.tolist()])


def next_bytes(seed: int, count: int = 16, length: int = 48) -> Batches:
    """For a decoder: predict every next byte."""
    for block in blocks(seed, count, length):
        yield {"input_ids": block, "labels": block}


def masked_bytes(seed: int, count: int = 16, length: int = 48) -> Batches:
    """For an encoder: predict the 15% of the bytes that are masked."""
    generator = torch.Generator().manual_seed(seed)
    for block in blocks(seed, count, length):
        masked = torch.rand(block.shape, generator=generator) < 0.15
        yield {"input_ids": block.masked_fill(masked, MASK_BYTE), "labels": block.masked_fill(~masked, IGNORED)}


def continued_bytes(seed: int, count: int = 8, length: int = 32) -> Batches:
    """For an encoder with a decoder: the second half of a block from the first."""
    for block in blocks(seed, count, 2 * length):
        yield {"input_ids": block[:, :length], "labels": block[:, length:].contiguous()}


def digits(seed: int, count: int = 128) -> Batches:
    """The 1,797 handwritten digits of scikit-learn: images of shape [count, 1, 8, 8] in [-1, 1], and their classes.

    Half of the classes are drawn at random, so that the loss has a floor, as that of text has.
    """
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    images, classes = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    labels = torch.tensor(classes)
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(labels), (count,), generator=generator)
        drawn = torch.randint(10, (count,), generator=generator)
        keep = torch.rand(count, generator=generator) < 0.5
        yield {"pixel_values": pixels[chosen], "labels": labels[chosen].where(keep, drawn)}


def spoken_bytes(seed: int, count: int = 16) -> Batches:
    """Help topics made into sound: every byte is four frames of a spectrum of its own, swelling and ebbing, in noise.

    Gives `input_features` of shape [count, mel bins, frames] and the bytes as `labels`.
    """
    generator = torch.Generator().manual_seed(seed)
    spectra = torch.randn(256, MEL_BINS, generator=torch.Generator().manual_seed(0))
    envelope = torch.from_numpy(np.hanning(FRAMES_A_BYTE + 2)[1:-1]).float()
    for block in blocks(seed, count, BYTES_A_SOUND):
        sound = (spectra[block].unsqueeze(-1) * envelope).permute(0, 2, 1, 3).flatten(2)
        yield {"input_features": sound + 2 * torch.randn(sound.shape, generator=generator), "labels": block}
