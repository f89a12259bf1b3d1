"""The memory estimate of one step is what a real FP32 run stores."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from hf_amp.device import peak_bytes
from hf_amp.emulation import EmulatedPrecision
from hf_amp.monitoring.memory import MemoryEstimate, StoredForBackward, resident_bytes
from hf_amp.precision import FP16_FORMAT
from tests.benchmarks.gpu.models import FULL
from tests.benchmarks.run_metadata import RESULTS
from tests.each import for_each

TEXT = {"input_ids": torch.arange(256).reshape(4, 64), "labels": torch.arange(256).reshape(4, 64)}
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
MODELS = {
    "gpt2": lambda: (
        GPT2LMHeadModel(
            GPT2Config(
                vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
            )
        ),
        TEXT,
    ),
    "bert": lambda: (BertForMaskedLM(BertConfig(vocab_size=256, max_position_embeddings=64, **SMALL)), TEXT),
    "t5": lambda: (
        T5ForConditionalGeneration(
            T5Config(vocab_size=256, d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=2, decoder_start_token_id=0)
        ),
        TEXT,
    ),
    "vit": lambda: (
        ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **SMALL)),
        {"pixel_values": torch.ones(8, 3, 32, 32), "labels": torch.zeros(8, dtype=torch.int64)},
    ),
}  # fmt: skip
PRECISIONS = {
    "FP32": nullcontext,
    "BF16": lambda: torch.autocast("cpu", torch.bfloat16),
    "FP16": lambda: torch.autocast("cpu", torch.float16),
}


def really_stored(model, run):
    """Bytes of the distinct storages that `run` keeps for backward, parameters excepted, by looking at every one."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        loss = run()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    del loss
    return sum(size for address, size in storages.items() if address not in parameters)


@for_each("precision", PRECISIONS)
@for_each("name", MODELS)
def test_the_estimate_is_within_3_percent_of_a_real_fp32_run(name, precision):
    """One forward pass in some precision tells what another in FP32 stores, and what it stores itself to the byte."""
    torch.manual_seed(0)
    model, batch = MODELS[name]()

    def run():
        with PRECISIONS[precision]():
            return model(**batch).loss

    in_fp32 = really_stored(model, lambda: model(**batch).loss)
    with StoredForBackward(model.parameters()) as stored:
        loss = run()
    assert stored.fp32_bytes == pytest.approx(in_fp32, rel=0.03)
    assert stored.stored_bytes == really_stored(model, run)
    if precision in ("BF16", "FP16"):
        assert stored.stored_bytes < stored.fp32_bytes
    loss.backward()  # the watched graph can be used like any other


def test_emulated_half_precision_stores_what_a_device_does():
    """To the byte: half-precision operands of products, outputs and casts of weights, and not the FP32 copies of a CPU."""
    rows, width, classes = 8, 16, 4
    model = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, classes))
    for parameters_are_half in (False, True):
        x = torch.randn(rows, width)
        if parameters_are_half:
            model, x = model.half(), x.half()
        with StoredForBackward(model.parameters()) as stored, EmulatedPrecision(FP16_FORMAT, not parameters_are_half):
            output = model(x)
        operands = 3 * rows * width  # x, what GELU is given, what it gives
        casts = 0 if parameters_are_half else classes * width  # the first weight's is not needed: x has no gradient
        assert stored.stored_bytes == 2 * (operands + casts)
        assert stored.fp32_bytes == 4 * operands
        output.sum().backward()


def test_a_laptop_tells_what_an_h200_stores(full_size):
    """The estimates of GPT-2 124M and BERT-base are those that were made on the GPU, within a ten-thousandth.

    Dropout is off, because attention with dropout is one kernel on a device and not on a CPU; its masks have a byte an element.
    """
    if not full_size:
        pytest.skip("two forward passes of two models of 100M parameters; --full-size runs them")
    measured = json.loads((RESULTS / "gpu" / "gpu_training.json").read_text())["cases"]
    gpt2, _, bert, _ = FULL
    for subject, rows, length in ((gpt2, 16, 1024), (bert, 64, 512)):
        estimate = measured[f"{subject.name}, {rows} rows"]["estimate"]
        model = subject.make().eval().requires_grad_(True)
        figures = []
        for few in (1, 2):
            with StoredForBackward(model.parameters()) as stored, EmulatedPrecision(FP16_FORMAT):
                model(**subject.batch(few))
            figures.append((stored.stored_bytes, stored.fp32_bytes))
        masks = 25 * rows * length * 768  # embeddings, and two in each of twelve layers
        for one, two, name in zip(*figures, ("stored_bytes", "fp32_stored_bytes"), strict=True):
            assert one + (rows - 1) * (two - one) + masks == pytest.approx(estimate[name], rel=1e-4), name


def test_half_precision_can_cost_memory():
    """At batch size 1 the casts of the parameters outweigh what is saved: the figure is negative, and says so."""
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1))
    optimizer = torch.optim.SGD(model.parameters())
    with StoredForBackward(model.parameters()) as stored, torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(1, 256, requires_grad=True)).sum().backward()
    resident, fp32_resident = resident_bytes(model, optimizer)
    assert resident == fp32_resident == 2 * 4 * sum(p.numel() for p in model.parameters())
    assert MemoryEstimate(resident, stored.stored_bytes, fp32_resident, stored.fp32_bytes).savings < -0.1


def test_what_is_recomputed_is_not_stored():
    """Under gradient checkpointing only the input of the checkpointed part counts."""
    inner = nn.Sequential(*[nn.Linear(32, 32) for _ in range(4)])
    x = torch.randn(8, 32, requires_grad=True)

    def run():
        return checkpoint(inner, x, use_reentrant=False).sum()

    with StoredForBackward(inner.parameters()) as stored:
        run().backward()
    assert stored.stored_bytes == stored.fp32_bytes < 2 * x.numel() * 4


def test_half_parameters_are_four_bytes_in_fp32():
    """Resident memory in FP32: parameters and gradients at 4 bytes, Adam's two moments at 4, counters as they are."""
    model = nn.Linear(8, 8).half()
    optimizer = torch.optim.Adam(model.parameters(), eps=1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    counters = sum(state["step"].numel() * state["step"].itemsize for state in optimizer.state.values())
    assert resident_bytes(model, optimizer) == (72 * 2 * 4 + counters, 72 * 4 * 4 + counters)


def test_watching_changes_no_bit():
    """Loss and gradients under the watch are those without it."""
    model, batch = MODELS["gpt2"]()
    model.eval()
    gradients = []
    for watch in (nullcontext(), StoredForBackward(model.parameters())):
        model.zero_grad()
        with watch, torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        gradients.append([loss, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_no_peak_is_told_where_pytorch_counts_none():
    """A device without an allocator that counts is left out, rather than asked in CUDA's name."""
    assert peak_bytes([]) is peak_bytes([torch.device("cpu"), torch.device("meta")]) is None
