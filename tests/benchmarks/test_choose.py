"""The precision audit against real half kernels: whether its order of configurations is theirs, and what its plans are worth.

`python -m tests.benchmarks.test_choose --out tests/benchmarks/results`

Six tiny models, trained on what ships with Python and scikit-learn. Predicted is what `hf_amp.choose` says, by emulation;
measured are PyTorch's own half kernels for CPUs, by code of its own: `torch.autocast("cpu")`, switched off around modules in
FP32, for training, and `model.to(dtype)` for inference.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from hf_amp.choose import _PLAIN, _Audit, choose_precision
from hf_amp.cli.demo_training import text_blocks
from tests.benchmarks.measuring import Row, parser, write
from tests.fallback.rescaled import ZOO

Batch = dict[str, Tensor]
DTYPES = {"BF16": torch.bfloat16, "FP16": torch.float16}
STEPS = 300
VALUES = 2.0**20
"""By which the values of one attention grow in the model that leaves FP16's range, and what reads them shrinks."""


@dataclass(frozen=True)
class Audited:
    """A model to be audited.

    Attributes:
        make: gives the model; the global seed decides its parameters.
        batches: seed → endless batches.
        head: name of the module that makes the logits.
        second_half: name of the list of blocks whose second half is in FP32 in a third of the configurations.
        blow_up: makes the trained model leave FP16's range, its function kept.
    """

    name: str
    make: Callable[[], nn.Module]
    batches: Callable[[int], Iterator[Batch]]
    head: str
    blocks: str
    blow_up: Callable[[nn.Module], None] = lambda model: None

    def trained(self, steps: int) -> tuple[nn.Module, Batch]:
        """The model after so many steps, and a batch that it has not seen."""
        torch.manual_seed(0)
        model, batches = self.make(), self.batches(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
        for batch in itertools.islice(batches, steps):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        self.blow_up(model.eval())
        return model, next(self.batches(1))

    def sets(self, model: nn.Module) -> dict[str, list[str]]:
        """What is in FP32 in each third of the configurations."""
        count = len(model.get_submodule(self.blocks))
        upper = [f"{self.blocks}.{index}" for index in range(count // 2, count)]
        return {"nothing": [], "head": [self.head], "head and upper half": [*upper, self.head]}


def text_batches(seed: int) -> Iterator[Batch]:
    """Blocks of 64 bytes of Python's help topics, 8 a batch."""
    blocks = torch.tensor(text_blocks())[:, :64]
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = blocks[torch.randint(len(blocks), (8,), generator=generator)]
        yield {"input_ids": chosen, "labels": chosen}


def translated_batches(seed: int) -> Iterator[Batch]:
    """For an encoder and decoder: the block backwards."""
    for batch in text_batches(seed):
        yield {"input_ids": batch["input_ids"], "labels": batch["input_ids"].flip(1)}


def llama(layers: int = 4, tied: bool = False, kind: str = "Llama") -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=256, hidden_size=128, intermediate_size=352, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=64, tie_word_embeddings=tied, pad_token_id=0,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=256, n_positions=64, n_embd=128, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=256, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def larger_values(model: nn.Module) -> None:
    """The second layer's values beyond 65504, the function as before, to the last bit in FP32."""
    attention = model.get_submodule("model.layers.1.self_attn")
    with torch.no_grad():
        attention.v_proj.weight.mul_(VALUES)
        attention.o_proj.weight.div_(VALUES)


_VIT = next(entry for entry in ZOO if entry.name == "ViT")
MODELS = [
    Audited("Llama", llama, text_batches, "lm_head", "model.layers"),
    Audited("Qwen3, tied head", functools.partial(llama, 4, True, "Qwen3"), text_batches, "lm_head", "model.layers"),
    Audited("GPT-2, tied head", gpt2, text_batches, "lm_head", "transformer.h"),
    Audited("T5", t5, translated_batches, "lm_head", "decoder.block"),
    Audited("ViT on digits", _VIT.make, _VIT.batches, "classifier", "vit.layers"),
    Audited("Llama, large values", llama, text_batches, "lm_head", "model.layers", larger_values),
]


# ---- measured: PyTorch's half kernels, without hf_amp ------------------------------------------------------------


def to_float32(value: Any) -> Any:
    """Half-precision tensors of nested arguments in FP32."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in DTYPES.values() else value
    if isinstance(value, (tuple, list)):
        return type(value)(map(to_float32, value))
    return {name: to_float32(x) for name, x in value.items()} if isinstance(value, dict) else value


def in_fp32(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A module's forward as it would be without autocast."""
    with torch.autocast("cpu", enabled=False):
        return forward(*to_float32(args), **to_float32(kwargs))


def log_probabilities(model: nn.Module, batch: Batch) -> Tensor:
    """Of the labels, one by one: next tokens of a causal model."""
    found = model(**batch).logits.float().log_softmax(-1)
    labels = batch["labels"]
    if not model.config.is_encoder_decoder and found.dim() == 3:
        found, labels = found[:, :-1], labels[:, 1:]
    return found.double().gather(-1, labels.unsqueeze(-1)).flatten()


@torch.no_grad()
def measured(model: nn.Module, batch: Batch, name: str, wide: Collection[str], inference: bool = False) -> float:
    """Root mean square error of log-probabilities in half kernels; inf where they are not finite."""
    exact, twin, dtype = log_probabilities(model, batch), copy.deepcopy(model), DTYPES[name]
    for module in map(twin.get_submodule, wide if not inference else ()):
        module.forward = functools.partial(in_fp32, module.forward)
    if inference:
        twin = twin.to(dtype)
        for module in map(twin.get_submodule, wide):  # the head: rounded parameters, FP32 products
            module._parameters = {
                key: None if x is None else nn.Parameter(x.float()) for key, x in module._parameters.items()
            }
            module.register_forward_pre_hook(lambda module, given: to_float32(given))
        batch = {key: x.to(dtype) if x.is_floating_point() else x for key, x in batch.items()}
        found = log_probabilities(twin, batch)
    else:
        with torch.autocast("cpu", dtype):
            found = log_probabilities(twin, batch)
    error = (found - exact).square().mean().sqrt().item()
    return error if error == error else float("inf")


# ---- predicted ---------------------------------------------------------------------------------------------------


def configurations(entry: Audited, model: nn.Module, batch: Batch, inference: bool) -> list[Row]:
    """What is predicted and measured of each format with each set of modules in FP32."""
    found = []
    with torch.no_grad():
        audit = _Audit(model, batch, "logprob", inference)
        for name in DTYPES:
            audited = audit.of_format(_PLAIN[name])
            for what, wide in entry.sets(model).items():
                if (
                    not inference or what != "head and upper half"
                ):  # whose FP32 blocks a half model cannot be followed by
                    found.append(
                        {
                            "model": entry.name,
                            "run": "inference" if inference else "autocast",
                            "format": name,
                            "in_FP32": what,
                            "predicted": audited.error(wide).rms,
                            "measured": measured(model, batch, name, wide, inference),
                        }
                    )
    return found


def compared(entry: Audited, steps: int) -> tuple[Row, list[Row]]:
    """The row of a model, and the rows of its configurations."""
    model, batch = entry.trained(steps)
    training, inference = (configurations(entry, model, batch, half) for half in (False, True))
    return {
        "model": entry.name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "pairs_out_of_order": out_of_order(training),
        "pairs_out_of_order_in_inference": out_of_order(inference),
        **chosen_plan(model, batch),
        **bf16_plan(model, batch),
    }, [*training, *inference]


def chosen_plan(model: nn.Module, batch: Batch) -> Row:
    """The plan, and its error as predicted and as measured."""
    plan, table = choose_precision(model, batch)
    chosen = table.number_format
    error = measured(model, batch, chosen, plan.modules) if chosen in DTYPES else None
    return {
        "plan": chosen + (f", FP32 in {', '.join(plan.modules)}" if plan.modules else ""),
        "error_predicted_over_BF16": round(table.chosen.rms / table.formats["BF16"].rms, 4),
        "error_over_BF16": None if error is None else round(error / measured(model, batch, "BF16", []), 4),
        "products_in_FP32": round(1 - table.chosen.half_products, 4),
    }


def bf16_plan(model: nn.Module, batch: Batch) -> Row:
    """What the same bound takes where FP16 is no choice."""
    bf16 = measured(model, batch, "BF16", [])
    plan, table = choose_precision(model, batch, number_format="BF16")
    met = table.number_format == "BF16"
    return {
        "BF16_modules_in_FP32": len(plan.modules) if met else "not met",
        "BF16_error_over_BF16": round(measured(model, batch, "BF16", plan.modules) / bf16, 4) if met else None,
        "BF16_products_in_FP32": round(1 - table.chosen.half_products, 4),
    }


def out_of_order(rows: list[Row]) -> int:
    """Pairs of configurations of which the audit calls the wrong one more exact."""
    pairs = itertools.combinations(rows, 2)
    return sum((a["predicted"] < b["predicted"]) != (a["measured"] < b["measured"]) for a, b in pairs if a != b)


def main() -> None:
    command = parser()
    command.add_argument("--steps", type=int, default=STEPS, help="of training")
    options = command.parse_args()
    rows, details = [], []
    for entry in MODELS:
        row, configurations = compared(entry, options.steps)
        print(row, *configurations, sep="\n  ", flush=True)
        rows.append(row)
        details += configurations
    for each in details:
        for column in ("predicted", "measured"):
            each[column] = float(f"{each[column]:.4g}") if each[column] < float("inf") else None
    write("choose", {"steps": options.steps, "rows": rows, "details": details}, options.out)


if __name__ == "__main__":
    main()
