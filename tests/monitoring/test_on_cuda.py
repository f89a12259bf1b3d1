"""Time and memory on a GPU: by its own clock and its allocator, without waiting."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_amp import PerformanceTracker
from hf_amp.device import peak_bytes
from hf_amp.monitoring.memory import StoredForBackward
from tests.host_reads import count_synchronisations

pytestmark = pytest.mark.gpu


def test_device_time_is_told_without_a_wait() -> None:
    """Steps of growing length: their order, their number and the share of each precision."""
    tracker = PerformanceTracker(device="cuda")
    x = torch.randn(2048, 2048, device="cuda")
    x @ x  # loads what products need
    with count_synchronisations() as waits:
        for _ in range(100):
            for products, precision in ((1, "FP16"), (8, "FP32")):
                with tracker.step(4, precision):
                    for _ in range(products):
                        x @ x
    assert waits.sources == []
    stats = tracker.get_stats()
    assert (stats["steps"], stats["clock"]) == (200, "device")
    assert 0 < stats["time_share"]["FP16"] < stats["time_share"]["FP32"]
    assert stats["avg_throughput"] == pytest.approx(800 / stats["total_seconds"])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_each_device_has_its_own_clock() -> None:
    """A tracker that is used for models on two devices in turn."""
    tracker = PerformanceTracker()
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        tracker.device = torch.device(device)
        for _ in range(3):
            with tracker.step(4):
                torch.ones(64, device=device).sum()
            torch.cuda.synchronize(device)
    assert tracker.get_stats()["steps"] == 9


def test_memory_is_the_allocators_peak() -> None:
    """In bytes; what was freed since counts."""
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    torch.empty(2**24, dtype=torch.uint8, device="cuda")
    with count_synchronisations() as waits:
        reported = peak_bytes([torch.device("cuda")])
    assert waits.sources == []
    assert reported == torch.cuda.max_memory_allocated() >= held + 2**24


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_memory_is_that_of_the_device_that_trains() -> None:
    """Whatever device is the current one; of a split model it is the fullest's."""
    for device in (0, 1):
        torch.cuda.reset_peak_memory_stats(device)
    held = torch.empty(2**26, dtype=torch.uint8, device="cuda:1")
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    with torch.cuda.device(first):
        assert peak_bytes([second]) == torch.cuda.max_memory_allocated(second) >= held.nbytes
        assert peak_bytes([first]) == torch.cuda.max_memory_allocated(first)
        assert peak_bytes([first, second]) == max(map(torch.cuda.max_memory_allocated, (first, second)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_estimate_is_what_the_allocator_gives(dtype: torch.dtype) -> None:
    """What a forward pass stores, as the estimate has it and as the allocator does: in half precision, and in FP32."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=2048, n_positions=512, n_embd=768, n_layer=4, n_head=8, use_cache=False, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).cuda()
    tokens = torch.randint(2048, (16, 512), device="cuda")

    def stored(half: bool) -> int:
        """Bytes that are there after a forward pass and were not before it."""
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", dtype, enabled=half):
            loss = model(input_ids=tokens, labels=tokens).loss
        kept = torch.cuda.memory_allocated() - before
        loss.backward()
        model.zero_grad()
        return kept

    for half in (True, False):
        stored(half)  # what libraries hold on to from their first use on
    with StoredForBackward(model.parameters()) as estimate, torch.autocast("cuda", dtype):
        model(input_ids=tokens, labels=tokens)
    assert estimate.stored_bytes == pytest.approx(stored(True), rel=0.1)
    assert estimate.fp32_bytes == pytest.approx(stored(False), rel=0.1)
