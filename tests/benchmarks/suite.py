"""The benchmarks: what each measures, beside what, and what was wanted of it."""

from __future__ import annotations

from dataclasses import replace

from tests.benchmarks.benchmark import Benchmark, Target
from tests.benchmarks.measuring import Row


def _module(name: str) -> str:
    return f"tests.benchmarks.test_{name}"


def _fused(row: Row) -> bool:
    return row["optimizer"] == "AdamW, fused"


def _is_default(row: Row) -> bool:
    return _fused(row) and row["what"] == "DYNAMIC"


def _learns(row: Row) -> bool:
    return row["scaling"].startswith("hf_amp") and row["scaling"] != "hf_amp CONSTANT"


def _meets_outliers(row: Row) -> bool:
    return row["scaling"].startswith("hf_amp ADAPTIVE") and row["task"] in ("text", "digits")


def _reads_text(row: Row) -> bool:
    return row["scaling"].startswith("hf_amp ADAPTIVE") and row["task"] == "text"


def _is_late(row: Row) -> bool:
    return row["what"] == "PERFORMANCE_OPTIMIZED" and row["optimizer"].startswith("fused")


def _is_hf_amp(row: Row) -> bool:
    return row["contender"] == "hf_amp"


def _rounds(row: Row) -> bool:
    return row["half_parameters"] == "stochastic_rounding"


def _compensates(row: Row) -> bool:
    return row["half_parameters"] == "kahan"


def _rounds_25m(row: Row) -> bool:
    return row["what"] == "stochastic_rounding" and row["parameters"] == "25M"


SCALER_COST = Benchmark(
    "scaler_cost",
    _module("scaler_cost"),
    "The step boundary alone (unscale, clip, AdamW, update) with everything of hf_amp on, by number of parameters; and what "
    "the guard of BF16 and FP32 takes around the call of an optimizer that does nothing, as a multiple of reading all "
    "gradients once and that call.",
    "`torch.amp.GradScaler` with `clip_grad_norm_`, in the same run",
    (
        Target("0.95 of stock or less by default (fused AdamW, DYNAMIC)", "ratio", 0.95, _is_default),
        Target("0.95 of stock or less in every strategy with a fused optimizer", "ratio", 0.95, _fused),
        Target("1.10 of stock or less with another", "ratio", 1.1, lambda row: row["optimizer"] == "AdamW, plain"),
        Target("one read or less for the guard", "ratio", 1.0, lambda row: row["what"] == "guard alone"),
    ),
    pivot=("parameters", "ratio"),
    options=("--clock", "thread"),
    threads=1,
)

CPU = (
    SCALER_COST,
    Benchmark(
        "trainer_cost",
        _module("trainer_cost"),
        "Eight steps of a `Trainer` with `MixedPrecisionCallback`, default options, by number of parameters, with all that a call "
        "of `train` does once.",
        "the same `Trainer` with the stock scaler, both in emulated FP16",
        (Target("1.01 of stock or less", "ratio", 1.01),),
        pivot=("parameters", "ratio"),
    ),
    Benchmark(
        "loop_cost",
        _module("loop_cost"),
        "Whole steps of our own loops in their default options, and of Lightning Fabric, by number of parameters.",
        "a hand-written loop over autocast, `torch.amp.GradScaler` and fused AdamW, all in emulated FP16",
        pivot=("parameters", "ratio"),
    ),
    Benchmark(
        "monitoring_cost",
        _module("monitoring_cost"),
        "Whole steps with monitoring, a close look and a log entry every 10 steps, by number of parameters.",
        "`enable_monitoring=False`",
        (Target("1.01 or less by default", "ratio", 1.01, lambda row: row["what"] == "default"),),
        pivot=("parameters", "ratio"),
    ),
    Benchmark(
        "fallback_cost",
        _module("fallback_cost"),
        "Whole steps with the fallback on while nothing goes wrong, and under plans that hold layers in FP32; and steps that are "
        "skipped for a cause that takes a replay, with all that is done to find it.",
        "`automatic_fallback=False`; of skipped steps, an applied one",
        (
            Target("1.01 or less while nothing goes wrong", "ratio", 1.01, lambda row: row["what"] == "on"),
            Target("two steps' time or less for a diagnosis", "ratio", 3.0, lambda row: row["over"] == "an applied step"),
        ),
        pivot=("parameters", "ratio"),
    ),
    Benchmark(
        "host_reads",
        _module("host_reads"),
        "How often a step reads the host, and so would wait for a GPU; counted, not timed.",
        "`torch.amp.GradScaler`, Lightning Fabric, and `Trainer` with the stock scaler",
        (
            Target("one a step at most, in every strategy", "host_reads_a_step", 1, lambda row: row["what"].isupper()),
            Target("none for PERFORMANCE_OPTIMIZED with a fused optimizer", "host_reads_a_step", 0, _is_late),
        ),
        pivot=("monitoring", "host_reads_a_step"),
    ),
    Benchmark(
        "scaling_quality",
        _module("scaling_quality"),
        "Skipped steps, underflow and final loss in emulated FP16: a GPT-2 on text (1,000 steps) and a ViT on digits (600), "
        "with gradients 64 times as large every 100 steps, and a T5 of which two layers leave FP16's range (200).",
        "FP32, `torch.amp.GradScaler`, and reference implementations of other libraries' rules",
        (
            Target("within 1% of the loss of FP32", "final_loss_over_FP32", 1.01, _learns),
            Target("ADAPTIVE skips a fifth of stock's steps or less, and so none", "skipped_steps", 0, _meets_outliers),
            Target("ADAPTIVE within 0.5% of the loss of FP32", "final_loss_over_FP32", 1.005, _meets_outliers),
            Target("ADAPTIVE underflows no more on text than stock, 0.0007", "underflow_fraction", 0.0007, _reads_text),
        ),
        threads=1,
    ),
    Benchmark(
        "rescue",
        _module("rescue"),
        "Models of which some modules leave FP16's range whatever the scale, trained for 200 steps in emulated FP16.",
        "`torch.amp.GradScaler`, which skips every step, and FP32",
        (
            Target("5 skipped steps or less", "skipped_steps", 5),
            Target("within 1% of the loss of FP32", "final_loss_over_FP32", 1.01),
        ),
        threads=1,
    ),
    Benchmark(
        "half_parameters",
        _module("half_parameters"),
        "BF16 parameters in five tiny models of transformers, 60 steps: the share of FP32's gain, the median of three seeds at learning "
        "rates of 1e-5, 3e-5 and 1e-4, and what the worst of them lacks of all. What stochastic rounding gains is the mean of runs with other "
        "random numbers: below, how many, their standard deviation, and that of FP32's own result when it is rounded stochastically to BF16 "
        "once, at the end.",
        "the same run in FP32; `None` is plain BF16",
        (
            Target("at least 97% of FP32's gain with stochastic rounding", "lacking_at_worst", 0.03, _rounds),
            Target("at least 97% of FP32's gain with kahan", "lacking_at_worst", 0.03, _compensates),
        ),
        pivot=("half_parameters", "share_of_gain"),
        threads=1,
    ),
    Benchmark(
        "half_step_cost",
        _module("half_step_cost"),
        "A step of BF16 parameters: CPU time of fused AdamW and all around it, operators in blocks of a GPU's size, and the bytes a parameter of "
        "parameters, state and master weights. Below, what PyTorch's operators take at least: BF16 to FP32, the fused step, and back to nearest, "
        "with everything prepared before, or rounded stochastically; and torchao's AdamW, which rounds parameters stochastically and state to "
        "nearest.",
        "fused AdamW on the BF16 parameters, which loses updates",
        (Target("1.3 of the plain step or less at 25M", "ratio", 1.3, _rounds_25m),),
        threads=1,
    ),
    Benchmark(
        "causes",
        _module("causes"),
        "420 random faults of 27 kinds, in random stacks and in 13 families of transformers: what was told of each, and how many "
        "runs had their scale, plan, buffers or end changed for a fault that this does not cure.",
        "what the fault was",
        (Target("none wrong", "wrong", 0), Target("no run harmed", "harmed", 0)),
        threads=1,
    ),
    Benchmark(
        "compare",
        _module("compare"),
        "`hf_amp.compare` on 200 pairs of tiny models of six architectures of which one has a corrupted module (weight, kernel result, "
        "dtype, transposed, dropped residual, wrong epsilon, stale buffer), in FP32, BF16 and emulated FP16: whether that module is "
        "named; every third also from two capture files alone. And on 100 pairs of the same function in other code: whether it is said "
        "to differ.",
        "what was corrupted",
        (
            Target("190 of 200 named", "not_seen", 10, lambda row: row["what"] == "all" and row["pairs"] == "corrupted"),
            Target("none named wrong, no false alarm", "wrong", 0),
        ),
        threads=1,
    ),
    Benchmark(
        "situations",
        _module("situations"),
        "27 situations of users in which training goes wrong, one and the same loop for all contenders, in emulated FP16: which "
        "runs go on, and what is said of cause, place, operator and line. Rules of judgement: `tests/benchmarks/test_situations.py`.",
        "stock Accelerate with `torch.amp.GradScaler`, and the debugging tools of transformers and PyTorch, in the same run",
        (
            Target("26 of 27 causes right", "causes_missed", 1, _is_hf_amp),
            Target("every place right", "places_missed", 0, _is_hf_amp),
            Target("no run lost that could go on", "lost_though_it_could_survive", 0, _is_hf_amp),
            Target("no false alarm", "false_alarms", 0, _is_hf_amp),
        ),
        threads=1,
    ),
    Benchmark(
        "rescale",
        _module("rescale"),
        "Tiny models with factors of 2^24 between their parameters that leave the function as it is and FP16 behind: in "
        "hand-written ways, in pairs of parameters that were found by trying, and at random, several at once. Below, what a large one "
        "takes in a process of its own, of which PyTorch itself is a part. KL is over 192 tokens or 16 images that no rescaling has "
        "seen; twins are 100 copies of the model without the factors whose weights, where they lie within 2% of a tie between two numbers "
        "of FP16, are rounded to either: what chance makes of it.",
        "the same model without the factors",
        (
            Target("none called safe that is not", "wrong", 0),
            Target("none farther from FP32 than 1.5 times as usual", "KL_beyond_1.5_times_usual", 0),
            Target("none of these farther than all twins", "of_these_beyond_all_twins", 0),
        ),
        threads=1,
    ),
    Benchmark(
        "loss_spikes",
        _module("loss_spikes"),
        "False alarms of the rule for loss spikes in ten healthy runs of 1,000 steps, and spikes found within ten steps of those planted "
        "(at least double the mean of the hundred losses before, and above them all).",
        "OLMo 2's spike score, ZClip's and Megatron-LM's rules, and LLM Foundry's, on the same losses",
        (
            Target("one false alarm in 10,000 steps or less", "false_alarms_per_10000_steps", 1, lambda row: row["rule"] == "hf_amp"),
            Target("40 of 50 planted spikes found", "missed", 10, lambda row: row["rule"] == "hf_amp"),
        ),
        threads=1,
    ),
    Benchmark(
        "choose",
        _module("choose"),
        "`hf_amp.choose_precision` on six trained tiny models: pairs of six configurations (FP16 or BF16 autocast; nothing, the head, the head and "
        "the upper half in FP32) that the audit orders otherwise than PyTorch's half kernels for CPUs, and the same of four in inference; the plan "
        "that it chooses, and what the half kernels make of it; the plan where BF16 is the only choice.",
        "PyTorch's half kernels without hf_amp; FP32",
        (
            Target("six configurations in the measured order", "pairs_out_of_order", 0),
            Target("at most a fifth of BF16's error", "error_over_BF16", 0.2),
            Target("at least 90% of the products in half precision", "products_in_FP32", 0.1),
        ),
        threads=1,
    ),
    Benchmark(
        "emulation_cost",
        _module("emulation_cost"),
        "Forward and backward under `hf_amp.emulate` on a CPU, which computes as autocast does on a device.",
        "the same model in FP32, on the same CPU",
        (Target("1.25 of FP32 or less in FP16", "ratio", 1.25, lambda row: row["what"] == "emulated FP16"),),
        pivot=("model", "ratio"),
        threads=1,
    ),
    Benchmark(
        "startup_cost",
        _module("startup_cost"),
        "Time of an import in a fresh process. `import hf_amp` loads a name when it is first used; `hf_amp.session` is most of it.",
        "what was imported before",
        (Target("50 ms or less for hf_amp", "milliseconds", 50, lambda row: row["what"] == "import hf_amp"),),
    ),
    Benchmark(
        "seeing_cost",
        _module("seeing_cost"),
        "Python that monitor and tracker run in a step, early and late in a run, and what they hold at its end.",
        "none",
    ),
    Benchmark(
        "report_cost",
        _module("report_cost"),
        "`hf-amp report` on a log of a million events.",
        "none",
        (Target("30 s or less", "seconds", 30), Target("1 GiB or less", "peak_bytes", 2**30)),
    ),
    Benchmark(
        "faults",
        "tests.faults",
        "Faults put into running trainings, and what became of the runs.",
        "none",
        (Target("no run lost", "lost", 0),),
    ),
)  # fmt: skip

GPU = (
    Benchmark(
        "gpu",
        "tests.gpu",
        "What `python -m tests.gpu` finds out beside training: tests marked `gpu`; FP16 emulated on a CPU beside the device's (tiny "
        "architectures, eight kinds of overflow and none, autocast and half parameters: modules, dtypes, finite elements of every output, "
        "which gradients overflow); random faults; kernels by PyTorch's profiler; boundaries with 20 to a wait; what a skip costs.",
        "emulation on the same machine's CPU; `torch.amp.GradScaler`; an applied step",
    ),
    replace(SCALER_COST, options=(), threads=None),  # the clock of a thread does not see the device
    Benchmark(
        "gpu_training",
        _module("gpu_training"),
        "Whole training steps on a GPU: speed, memory at its peak, and how often the host waits for the device.",
        "FP32, BF16 and the stock scaler, in the same run",
    ),
)

SUITES = {"cpu": CPU, "gpu": GPU}


def folder_of(suite: str) -> str:
    """Where a suite's files lie inside of the folder of results: both have a `scaler_cost.json`."""
    return "." if suite == "cpu" else suite
