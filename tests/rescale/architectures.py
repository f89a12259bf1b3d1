"""Tiny models of any architecture of transformers, and pairs of parameters whose factors cancel out, found by trying.

No rule of hf_amp has a say in it: a pair counts where the FP32 outputs stay the same when one is multiplied and the other divided.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor

VOCABULARY, ROWS, LENGTH = 96, 2, 12
TRIED = 2.0**5
SMALL: Mapping[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.1, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48,
    "n_positions": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "dim": 32,
    "hidden_dim": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "ffn_dim": 48, "embedding_size": 32, "rotary_dim": 4, "init_std": 0.1,
    "image_size": 16, "patch_size": 4, "num_channels": 3, "num_labels": 5, "num_experts": 4, "num_local_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "sliding_window": 8, "word_embed_proj_dim": 32, "decoder_vocab_size": VOCABULARY,
    "attention_window": 8, "emb_dim": 32, "ffn_hidden_size": 48, "ffn_size": 48, "n_ctx": 64, "d_inner": 48, "d_head": 8,
    "query_pre_attn_scalar": 8, "embed_dim": 32, "mlp_dim": 48, "max_seq_len": 64, "lm_head_bias": False, "num_groups": 2,
    "max_source_positions": 64, "max_target_positions": 64, "type_vocab_size": 2, "tie_word_embeddings": False,
    "layer_types": None, "use_mems_train": False,
}  # fmt: skip


def made(name: str, seed: int = 0, **options: Any) -> Any:
    """A tiny model of the class of that name in `transformers`, in evaluation mode, with norm weights that are not all 1.

    Args:
        options: of the configuration, before those that make any model small.
    """
    cls = getattr(transformers, name)
    accepted = set(inspect.signature(cls.config_class.__init__).parameters) | set(
        getattr(cls.config_class, "__annotations__", {})
    )
    accepted |= {k for each in cls.config_class.__mro__ for k in getattr(each, "__annotations__", {})}
    chosen = {k: v for k, v in SMALL.items() if k in accepted and v is not None} | options
    torch.manual_seed(seed)
    config = cls.config_class(**{k: v for k, v in chosen.items() if v is not None})
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) / 8)
    return model


def inputs(model: Any, seed: int = 0, rows: int = ROWS) -> dict[str, Tensor]:
    """A batch of the kind that the model takes."""
    draw = torch.Generator().manual_seed(seed)
    name = model.main_input_name
    if name == "pixel_values":
        size = getattr(model.config, "image_size", 16) or 16
        size = size if isinstance(size, int) else size[0]
        return {name: torch.randn(rows, getattr(model.config, "num_channels", 3), size, size, generator=draw)}
    if name == "input_values":
        return {name: torch.randn(rows, 1600, generator=draw)}
    batch = {"input_ids": torch.randint(3, VOCABULARY, (rows, LENGTH), generator=draw)}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = torch.randint(3, VOCABULARY, (rows, LENGTH), generator=draw)
    return batch


@torch.no_grad()
def logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The first floating-point output, in FP32."""
    dtype = next(model.parameters()).dtype
    batch = {k: x.to(dtype) if x.is_floating_point() else x for k, x in batch.items()}
    output = model(**batch)
    found = output.get("logits")
    return (next(x for x in output.values() if isinstance(x, Tensor)) if found is None else found).float()


def layer_parts(model: Any) -> Iterator[list[tuple[str, Tensor, Tensor | None]]]:
    """Of each layer: (name, weight, bias) of everything that has a weight, fused ones in equal parts."""
    layers: dict[str, list[tuple[str, Tensor, Tensor | None]]] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        found = re.search(r"\.(\d+)\.", f"{name}.")
        if found is None or not isinstance(weight, torch.nn.Parameter):
            continue
        bias = getattr(module, "bias", None)
        layer = f"{name}."[: found.end()]
        parts = layers.setdefault(layer, [])
        parts.append((name, weight.data, None if bias is None else bias.data))
        out = 1 if type(module).__name__ == "Conv1D" else 0
        for count in (2, 3) if weight.ndim > 1 else ():
            if weight.shape[out] % count == 0 and weight.shape[out] > weight.shape[1 - out]:
                for i in range(count):
                    part = weight.data.chunk(count, out)[i]
                    parts.append((f"{name}[{i}/{count}]", part, None if bias is None else bias.data.chunk(count)[i]))
    yield from layers.values()


def symmetries(
    model: Any, batch: Mapping[str, Tensor], most: int = 3, tries: int = 400
) -> list[tuple[str, list[Tensor], list[Tensor]]]:
    """(names, multiplied, divided) of pairs whose factors cancel out, of the first layers; found by trying each in FP32."""
    plain, found, taken = logits(model, batch), [], set()
    for parts in itertools.islice(layer_parts(model), 4):
        for (a, weight, bias), (b, reader, _) in itertools.permutations(parts, 2):
            itself = a.split("[")[0] == b.split("[")[0] and "[" not in a + b
            if tries == 0 or a in taken or b in taken or itself:
                continue
            tries -= 1
            multiplied, divided = [weight, *([] if bias is None else [bias])], [reader]
            if same_with(model, batch, plain, multiplied, divided, TRIED):
                found.append((f"{a} / {b}", multiplied, divided))
                taken |= {a, b}
                if len(found) == most:
                    return found
            reader_bias = next(x for name, _, x in parts if name == b)
            if reader_bias is not None and same_with(model, batch, plain, multiplied, [reader, reader_bias], TRIED):
                found.append((f"{a} / {b} with bias", multiplied, [reader, reader_bias]))
                taken |= {a, b}
                if len(found) == most:
                    return found
    return found


def same_with(
    model: Any, batch: Mapping[str, Tensor], plain: Tensor, up: list[Tensor], down: list[Tensor], factor: float
) -> bool:
    """Whether the outputs stay the same to the last bit, and do change where only one of both is multiplied."""
    scale(up, factor)
    alone = torch.equal(logits(model, batch), plain)
    scale(down, 1 / factor)
    both = torch.equal(logits(model, batch), plain)
    scale(up, 1 / factor)
    scale(down, factor)
    return both and not alone


def scale(tensors: list[Tensor], factor: float) -> None:
    """Multiplies in place."""
    for tensor in tensors:
        tensor.mul_(factor)
