"""Which precision to train in on a device, and why."""

from __future__ import annotations

from dataclasses import dataclass

from hf_amp.cli.doctor.machine import WORTHWHILE, Device


@dataclass(frozen=True)
class Recommendation:
    """What to train in.

    Attributes:
        precision: `BF16`, `FP16` or `FP32`.
        trainer: what to pass to `TrainingArguments`.
        why: one or two sentences.
    """

    precision: str
    trainer: str
    why: str


def recommend(device: Device) -> Recommendation:
    """The precision for `device`: BF16 where it is native, else FP16 where that is, else FP32."""
    hardware = device.hardware
    if hardware.device == "cpu":
        return _recommend_for_cpu(device)
    if hardware.device != "cuda":
        return Recommendation(
            "FP32",
            "",
            f"{hardware.name} has FP16 and BF16, but hf_amp has not been measured there: begin with FP32.",
        )
    if hardware.bf16 == "native":
        return Recommendation(
            "BF16",
            "bf16=True",
            f"{hardware.name} has units for BF16, which has the range of FP32: nothing to scale, nothing overflows that FP32 "
            "would hold. FP16 (fp16=True) is as fast and has 3 more bits of precision, for models whose activations "
            "stay below 65504: `hf-amp preflight` tells.",
        )
    if hardware.fp16 == "native":
        return Recommendation(
            "FP16",
            "fp16=True",
            f"{hardware.name} has units for FP16 and none for BF16, which would be slow. hf_amp keeps the scale, and takes "
            "modules that leave the range to FP32.",
        )
    return Recommendation(
        "FP32", "", f"{hardware.name} has no units for half precision: FP16 saves memory there, but no time."
    )


def _recommend_for_cpu(device: Device) -> Recommendation:
    speed = device.speed("BF16")
    if speed is not None and speed >= WORTHWHILE:
        return Recommendation(
            "BF16",
            "bf16=True, use_cpu=True",
            f"BF16 products were {speed:.1f} times as fast as FP32's, as measured just now.",
        )
    if speed is None and device.hardware.bf16 == "native":
        return Recommendation(
            "FP32",
            "use_cpu=True",
            "This CPU has units for BF16; whether BF16 is faster there has not been measured, as `hf-amp doctor` does unless it "
            "is told not to.",
        )
    measured = (
        ""
        if speed is None
        else f" BF16 products took {1 / speed:.1f} times as long as FP32's, as measured just now."
    )
    return Recommendation(
        "FP32",
        "use_cpu=True",
        f"Half precision gains nothing on this CPU.{measured} To find out whether a model overflows in FP16, run it with fp16=True "
        "and hf_amp, which emulates FP16 at about FP32's speed.",
    )
