"""What a device can run is said truthfully."""

import dataclasses
import inspect
import os
import platform
from pathlib import Path

import pytest
import torch

from hf_amp.device import Hardware, _generator_of, amd_gpu, probe
from tests.each import for_each
from tests.host_reads import count_host_reads


@for_each("device", ["cpu", torch.device("cpu"), "cpu:0"])
def test_a_cpu_has_a_name_and_kernels(device):
    """FP16 and BF16 run on every CPU, with units or without."""
    hardware = probe(device)
    assert hardware.device == "cpu"
    assert {hardware.fp16, hardware.bf16} <= {"native", "slow"}
    assert hardware.name


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not Path("/proc/cpuinfo").is_file() or "ONEDNN_MAX_CPU_ISA" in os.environ,
    reason="needs Linux on x86-64, and oneDNN without a limit",
)
def test_a_cpu_has_the_units_that_linux_lists():
    """AVX512-FP16 or AMX-FP16 for one format, AVX512-BF16 or AMX-BF16 for the other."""
    flags = set(Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split())
    hardware = probe("cpu")
    assert (hardware.fp16 == "native") == bool(flags & {"avx512_fp16", "amx_fp16"})
    assert (hardware.bf16 == "native") == bool(flags & {"avx512_bf16", "amx_bf16"})


@pytest.mark.parametrize("limit", ["AVX512_CORE", "avx512_core_vnni"])
def test_bf16_kernels_that_are_kept_off_the_units_are_slow(monkeypatch, limit):
    """Under these limits oneDNN still says that it has BF16 kernels: measured 5 times slower than FP32's."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert probe("cpu").bf16 == "slow"


def test_a_cpu_has_no_narrower_formats():
    """FP8 and TF32 are those of GPUs, and so is a compute capability."""
    hardware = probe("cpu")
    assert (hardware.fp8, hardware.tf32, hardware.capability) == ("none", "none", None)


@pytest.mark.gpu
def test_a_gpu_has_what_its_capability_says():
    """FP8 from 8.9 on, TF32 and BF16 from 8.0 on."""
    hardware = probe("cuda")
    assert hardware.capability == torch.cuda.get_device_capability()
    assert (hardware.fp8 == "native") == (hardware.capability >= (8, 9))
    assert (hardware.tf32 == "native") == (hardware.bf16 == "native") == (hardware.capability >= (8, 0))


@for_each(
    ("architecture", "formats"),
    [
        ("gfx906:sramecc+:xnack-", set()),
        ("gfx90a:sramecc+:xnack-", {"fp16", "bf16"}),
        ("gfx942:sramecc+:xnack-", {"fp16", "bf16", "fp8", "tf32"}),
        ("gfx1030", set()),
        ("gfx1100", {"fp16", "bf16"}),
        ("gfx1201", {"fp16", "bf16", "fp8"}),
    ],
)
def test_an_amd_gpu_is_not_taken_for_one_of_nvidia(architecture, formats):
    """ROCm gives gfx906 and gfx90a the capability (9, 0), which is Hopper's: their names tell them apart."""
    facts = dataclasses.asdict(amd_gpu("AMD Instinct", architecture))
    assert {name for name, has in facts.items() if has == "native"} == formats


def test_what_a_device_of_another_type_can_run_is_not_known():
    """Accelerators that hf_amp was not tried on are named by their type, and are not called native."""
    assert probe("meta") == Hardware("meta", "meta", fp16="unknown", bf16="unknown")
    assert "has not been tried" in probe("meta").describe_fp16(emulate=False)


def test_probing_reads_no_tensor():
    """Finding out costs no host read."""
    with count_host_reads() as reads:
        probe("cpu")
    assert reads.count == 0


@for_each("field", ["device", "name", "fp16", "bf16"])
def test_the_record_is_frozen(field):
    """What was found is not changed."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(probe("cpu"), field, "native")


@for_each(
    ("hardware", "emulate", "words"),
    [
        (Hardware("cpu", "x86_64", "slow", "slow"), True, ["emulated", "not faster than FP32"]),
        (Hardware("cpu", "x86_64", "slow", "native"), False, ["real FP16", "x86_64", "no units", "slower than"]),
        (Hardware("cuda", "GTX 1080", "slow", "slow"), True, ["real FP16", "GTX 1080", "slower than FP32"]),
    ],
)
def test_slow_fp16_is_called_slow(hardware, emulate, words):
    """Nobody is told that FP16 is fast where it is emulated or has no units."""
    phrase = hardware.describe_fp16(emulate)
    assert [word for word in words if word not in phrase] == []


@pytest.mark.parametrize("emulate", [True, False])
def test_native_fp16_is_never_called_emulated(emulate):
    """The emulate option concerns CPUs only."""
    phrase = Hardware("cuda", "H100", "native", "native").describe_fp16(emulate)
    assert phrase == "real FP16 on H100"


def test_a_cpu_with_units_is_called_neither_slow_nor_fast():
    """Nor is its emulation called real."""
    hardware = Hardware("cpu", "x86_64", "native", "native")
    assert hardware.describe_fp16(emulate=False) == "real FP16 on x86_64"
    assert hardware.describe_fp16(emulate=True).startswith("FP16 emulated")


@for_each(("device", "takes"), [("cuda:1", ("cuda:1",)), ("xpu:0", ("xpu:0",)), ("mps", ())])
def test_generators_are_asked_as_their_devices_are(device: str, takes: tuple[str, ...]) -> None:
    """Every CUDA and XPU device has one; MPS has a single one, whose functions took no device for long."""
    module, which = _generator_of(torch.device(device))
    assert which == tuple(map(torch.device, takes))
    inspect.signature(module.get_rng_state).bind(*which)
    inspect.signature(module.set_rng_state).bind(torch.zeros(16), *which)
