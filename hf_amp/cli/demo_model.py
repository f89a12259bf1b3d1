"""What `hf-amp demo` trains: a small GPT-2 whose residual stream is far beyond FP16's range, and help topics as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_amp.cli.rescaling import Rescaling

if TYPE_CHECKING:
    from datasets import Dataset

BLOCK_BYTES = 128
STREAM_FACTOR = 2.0**21
"""Large enough that all that writes to the stream leaves FP16's range (65504) at once; a power of two rounds nothing."""


def text_blocks() -> list[list[int]]:
    """About 700 kB of English, which comes with Python, in blocks of 128 bytes."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    return [list(text[i : i + BLOCK_BYTES]) for i in range(0, len(text) - BLOCK_BYTES, BLOCK_BYTES)]


def help_topics() -> Dataset:
    """The same as a data set: columns `input_ids` and `labels`, each a list of 128 ints."""
    from datasets import Dataset

    blocks = text_blocks()
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks})


def residual_stream(factor: float) -> Rescaling:
    """All parameters of a GPT-2 that write to its residual stream, times `factor`; the norms that read it undo that."""
    return Rescaling({r"transformer\.w[tp]e\.weight|.*\.c_proj\.(weight|bias)": factor})


def small_gpt2(factor: float = STREAM_FACTOR) -> GPT2LMHeadModel:
    """A GPT-2 of 0.21M parameters over single bytes; its function is the same for every `factor` of its stream."""
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256, n_positions=BLOCK_BYTES, n_embd=96, n_layer=2, n_head=4, n_inner=192,
            initializer_range=0.08, layer_norm_epsilon=1e-5 * factor**2, tie_word_embeddings=False,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    residual_stream(factor).apply(model)
    return model


@torch.no_grad()
def held_out_loss(model: GPT2LMHeadModel, blocks: Dataset) -> float:
    """Mean loss on `blocks` in FP32 on the CPU, in nats a byte, whatever precision the model was trained in."""
    ids = torch.tensor(blocks["input_ids"][:])
    model.train(False)
    return float(model.cpu()(input_ids=ids, labels=ids).loss)
