"""What the fallback costs while nothing goes wrong: whole training steps with it on, as a ratio to those with it off; and what
a skipped step costs whose cause takes a replay, as a ratio to an applied one.

`python -m tests.benchmarks.test_fallback_cost --out tests/benchmarks/results`
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_amp import AdvancedGradScaler, AmpSession, Cause, MixedPrecisionConfig, PrecisionMode
from hf_amp.device import probe
from hf_amp.fallback.plan import PrecisionPlan
from tests.benchmarks.measuring import Row, compared, device, interleaved, parser, write
from tests.benchmarks.models import INIT_SCALE, SIZES, batch, gpt2


def training_step(size: str, device: str, fp32_share: float = 0.0, **options: Any) -> Callable[[], None]:
    """One optimizer step under a session; on a CPU in emulated FP16.

    Args:
        fp32_share: share of the layers that a plan holds in FP32.
    """
    model, inputs = gpt2(size, device), batch(size, device)
    config = MixedPrecisionConfig(init_scale=INIT_SCALE, **options)
    scaler = AdvancedGradScaler(config, device)
    session = AmpSession(config, scaler, PrecisionMode.MIXED, probe(device))
    session.register_model(model)
    held = [f"transformer.h.{i}" for i in range(round(fp32_share * SIZES[size].layers))]
    plan = PrecisionPlan(PrecisionMode.MIXED).with_modules(held, PrecisionMode.FP32)
    session._fallback.runner.apply(plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with session.autocast():
            loss = model(**inputs).loss
        scaler.scale(loss).backward()
        scaler.clip_grad_norm_(optimizer, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


FAULTS: dict[Cause, Callable[[Tensor], Tensor]] = {
    Cause.ROUNDING: lambda h: h + 0 * (h * 0 + 1.0002 - 1.0001).log(),
    Cause.DERIVATIVE: lambda h: h + (h - h.detach()).abs().sqrt(),
    Cause.MODEL: lambda h: h + (h - h) / (h - h),
}
"""Cause → what makes it of a module's output."""
IN_A_BLOCK = (Cause.ACTIVATION, *FAULTS, Cause.BUFFER)


def skipped_step(
    size: str, device: str, cause: Cause | None, block: int = 0, in_backward: bool = False, loss_factor: float = 1.0
) -> Callable[[], None]:
    """One step that is skipped for `cause`, whatever came before; None is an applied one. Precision and scale do not change.

    Args:
        block: where it arises, if in a block.
        in_backward: whether it is a gradient that leaves the range of FP16, and no value.
        loss_factor: what the model's loss is multiplied by; the scale that a large one needs is known from the first skip on.
    """
    model, inputs = gpt2(size, device), batch(size, device)
    config = MixedPrecisionConfig(init_scale=INIT_SCALE, automatic_fallback=False)
    scaler = AdvancedGradScaler(config, device)
    session = AmpSession(config, scaler, PrecisionMode.MIXED, probe(device))
    session.sinks.clear()
    mlp = model.transformer.h[block].mlp
    fault = (lambda h: h + (h - h.detach()) * 1e16) if in_backward else FAULTS.get(cause) if cause else None
    if cause is Cause.BUFFER:
        mlp.register_buffer("factor", torch.ones(1, device=device))
        fault = lambda h: h * mlp.factor.to(h)  # noqa: E731
    if fault:
        mlp.register_forward_hook(lambda _module, _arguments, output: fault(output))
    model.register_forward_hook(lambda _module, _arguments, output: setattr(output, "loss", output.loss * loss_factor))
    session.register_model(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        scaler.set_scale(2.0**40 if cause is Cause.SCALE and loss_factor == 1.0 else INIT_SCALE)
        with session.autocast():
            loss = model(**inputs).loss
        scaler.scale(loss).backward()
        scaler.clip_grad_norm_(optimizer, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        newest = session.events[-1].cause if session.events else None
        assert newest is cause, f"{newest}, not {cause}"

    if cause is Cause.BUFFER:  # after a step that was finite
        expected, cause = cause, None
        step()
        cause = expected
        mlp.factor.fill_(float("nan"))
    with torch.no_grad():
        if cause is Cause.ACTIVATION and not in_backward:
            mlp.c_proj.weight.mul_(1e7)
        elif cause is Cause.WEIGHTS:
            mlp.c_fc.bias[0] = float("nan")
        elif cause is Cause.INPUT:
            embedded = model.transformer.wte(inputs.pop("input_ids"))
            inputs["inputs_embeds"] = embedded.fill_(float("nan"))
    return step


def measure_skips(size: str, rounds: int, device: str) -> list[Row]:
    """A skipped step, with all that is done to find its cause, over an applied one."""
    contenders = {"an applied step": skipped_step(size, device, None)}
    for cause in (Cause.SCALE, Cause.WEIGHTS, Cause.INPUT):
        contenders[f"a skip by {cause.value}"] = skipped_step(size, device, cause)
    for cause in IN_A_BLOCK:
        for block, where in enumerate(("first", "last")):
            contenders[f"a skip by {cause.value}, {where} block"] = skipped_step(size, device, cause, -block)
    for block, where in enumerate(("first", "last")):
        name = f"a skip by ACTIVATION in backward, {where} block"
        contenders[name] = skipped_step(size, device, Cause.ACTIVATION, -block, in_backward=True)
    contenders["a skip by SCALE, which is below 1"] = skipped_step(size, device, Cause.SCALE, loss_factor=1e12)
    return compared(
        interleaved(contenders, rounds, "thread" if device == "cpu" else "wall"), "an applied step", parameters=size
    )


def measure(size: str, rounds: int, device: str) -> list[Row]:
    """All ratios at one size."""
    contenders = {
        "off": training_step(size, device, automatic_fallback=False),
        "on": training_step(size, device),
        "on, 10% of the layers in FP32": training_step(size, device, fp32_share=0.15),
        "on, half of the layers in FP32": training_step(size, device, fp32_share=0.5),
    }
    return compared(interleaved(contenders, rounds), "off", parameters=size)


def main() -> None:
    options = parser(["1M", "25M"]).parse_args()
    rows = [row for size in options.sizes for row in measure(size, options.rounds or 2 * SIZES[size].rounds, device())]
    rows += [
        row for size in options.sizes for row in measure_skips(size, options.rounds or SIZES[size].rounds, device())
    ]
    write("fallback_cost", {"rows": rows}, options.out)


def test_every_contender_runs() -> None:
    """The benchmark itself is sound: each contender runs, and there is a ratio for each."""
    assert len(measure("tiny", rounds=2, device="cpu")) == 3
    assert len(measure_skips("tiny", rounds=2, device="cpu")) == 16


if __name__ == "__main__":
    main()
