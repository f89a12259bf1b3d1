"""Tiny models of fifteen families, and what may be moved in each without changing its function.

The factors are written down by hand, from the equations of the architectures; a test holds each against the plain model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY, ROWS, LENGTH, LAYERS = 96, 2, 12, 2


@dataclass(frozen=True)
class Factor:
    """One parameter, or a slice of it, times 2 to the power of `sign` times the exponent of the blow-up.

    Attributes:
        names: pattern of whole parameter names.
        sign: 1, or -1 for what is divided.
        part: (which, of how many) equal parts along `dim`; None for all of it.
        dim: the dimension that is cut.
        offset: what the norm adds to the parameter: the sum is multiplied.
    """

    names: str
    sign: int = 1
    part: tuple[int, int] | None = None
    dim: int = 0
    offset: float = 0.0

    def apply(self, model: nn.Module, exponent: int) -> None:
        """Multiplies in place."""
        found = [p for name, p in model.named_parameters() if re.fullmatch(self.names, name)]
        assert found, f"no parameter is called {self.names}"
        for parameter in found:
            part = parameter.data
            if self.part is not None:
                part = part.chunk(self.part[1], self.dim)[self.part[0]]
            part.add_(self.offset).mul_(2.0 ** (self.sign * exponent)).sub_(self.offset)


@dataclass(frozen=True)
class Symmetry:
    """Factors that cancel out, and numbers of the configuration, mostly epsilons, that go with their square.

    Attributes:
        factors: of parameters; with "{}" in their patterns they hold for one layer at a time.
        squares: fields of the configuration.
    """

    factors: Sequence[Factor]
    squares: Sequence[str] = ()


@dataclass(frozen=True)
class Family:
    """An architecture, tiny.

    Attributes:
        name: of the model's class.
        config: its configuration.
        symmetries: way → the factors; "{}" stands for the layer.
        batch: kind of batch: "tokens", "pairs", "pixels", "sound", "clip".
    """

    name: str
    config: Mapping[str, Any]
    symmetries: Mapping[str, Symmetry]
    batch: str = "tokens"

    def plain(self, seed: int = 0) -> Any:
        """The model as it is initialised, with norm weights and biases that are not all alike."""
        return self._made(dict(self.config), seed)

    def _made(self, options: dict[str, Any], seed: int) -> Any:
        torch.manual_seed(seed)
        cls = getattr(transformers, self.name)
        model = cls(cls.config_class(**options)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) / 8)
        return model

    def blown_up(self, exponents: Mapping[str, int], seed: int = 0) -> Any:
        """The same function with factors; keys of `exponents` are ways, or "way 1" for the layer of that number alone."""
        options, squared = {k: dict(v) if isinstance(v, Mapping) else v for k, v in self.config.items()}, []
        for key, exponent in exponents.items():
            symmetry = self.symmetries[key.split()[0]]
            squared += [(name, exponent) for name in symmetry.squares]
        plain = self.plain(seed)
        for name, exponent in squared:
            owner, *path = name.split(".")[::-1]
            inside, values = plain.config, options
            for each in path:
                inside, values = getattr(inside, each), values[each]
            number = values.get(owner, getattr(inside, owner))
            values[owner] = type(number)(number * 4.0**exponent)
        model = self._made(options, seed)
        with torch.no_grad():
            for key, exponent in exponents.items():
                way, _, layer = key.partition(" ")
                for factor in self.symmetries[way].factors:
                    names = factor.names.replace("{}", layer or r"\d+")
                    Factor(names, factor.sign, factor.part, factor.dim, factor.offset).apply(model, exponent)
        return model

    def inputs(self, seed: int = 0, rows: int = ROWS) -> dict[str, Tensor]:
        """A batch without labels."""
        draw = torch.Generator().manual_seed(seed)
        tokens = torch.randint(3, VOCABULARY, (rows, LENGTH), generator=draw)
        if self.batch == "tokens":
            return {"input_ids": tokens}
        if self.batch == "pairs":
            return {
                "input_ids": tokens,
                "decoder_input_ids": torch.randint(3, VOCABULARY, (rows, LENGTH), generator=draw),
            }
        if self.batch == "sound":
            return {"input_features": torch.randn(rows, 8, 2 * LENGTH, generator=draw), "decoder_input_ids": tokens}
        pixels = {"pixel_values": torch.randn(rows, 3, 8, 8, generator=draw)}
        return pixels if self.batch == "pixels" else {**pixels, "input_ids": tokens}


def pair(writer: str, reader: str, part: tuple[int, int] | None = None, dim: int = 0, bias: bool = False) -> Symmetry:
    """What one product makes larger the next makes smaller."""
    return Symmetry(
        [Factor(rf"{writer}\.{'(weight|bias)' if bias else 'weight'}", 1, part, dim), Factor(rf"{reader}\.weight", -1)]
    )


def scores(query: str, key: str, bias: bool = False) -> Symmetry:
    """Queries times keys."""
    ending = "(weight|bias)" if bias else "weight"
    return Symmetry([Factor(rf"{query}\.{ending}"), Factor(rf"{key}\.{ending}", -1)])


def stream(written: str, *squares: str, divided: str | None = None) -> Symmetry:
    """All that writes to the residual stream, which only norms read."""
    return Symmetry([Factor(written), *([Factor(divided, -1)] if divided else [])], squares)


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
DECODER = {
    **SIZES, "vocab_size": VOCABULARY, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
LAYER = r"model\.layers\.{}"
LLAMA = {
    "stream": stream(r"model\.embed_tokens\.weight|.*\.(o_proj|down_proj)\.weight", "rms_norm_eps"),
    "mlp": pair(rf"{LAYER}\.mlp\.up_proj", rf"{LAYER}\.mlp\.down_proj"),
    "values": pair(rf"{LAYER}\.self_attn\.v_proj", rf"{LAYER}\.self_attn\.o_proj"),
    "scores": scores(rf"{LAYER}\.self_attn\.q_proj", rf"{LAYER}\.self_attn\.k_proj"),
}
_NORMED = rf"{LAYER}\.self_attn"
QWEN3 = {
    **LLAMA,
    # The norms of queries and keys share the epsilon, so that these grow too.
    "stream": stream(r"model\.embed_tokens\.weight|.*\.(o_proj|down_proj|q_proj|k_proj)\.weight", "rms_norm_eps"),
    "scores": scores(rf"{_NORMED}\.q_norm", rf"{_NORMED}\.k_norm"),
}
_POST = r".*\.(post_attention_layernorm|post_feedforward_layernorm)\.weight"
_GEMMA_STREAM = Symmetry([Factor(r"model\.embed_tokens\.weight"), Factor(_POST, offset=1.0)])
GEMMA2 = {
    "stream": _GEMMA_STREAM, "mlp": LLAMA["mlp"], "values": LLAMA["values"], "scores": LLAMA["scores"],
}  # fmt: skip
GEMMA3 = {
    **GEMMA2,
    # Scores are divided by the root of a number of the configuration; 1 + weight cannot be made smaller without rounding.
    "scores": Symmetry([Factor(rf"{_NORMED}\.q_norm\.weight", offset=1.0)], ["query_pre_attn_scalar"]),
}
_T5_SELF = r"(encoder|decoder)\.block\.{}\.layer\.0\.SelfAttention"
_T5_FEED = r"(encoder|decoder)\.block\.{}\.layer\.\d\.DenseReluDense"
T5 = {
    "stream": stream(
        r"shared\.weight|.*\.(o|wo)\.weight", "layer_norm_epsilon", divided=r"decoder\.final_layer_norm\.weight"
    ),
    "values": pair(rf"{_T5_SELF}\.v", rf"{_T5_SELF}\.o"),
    "scores": scores(rf"{_T5_SELF}\.q", rf"{_T5_SELF}\.k"),
}
_BART = r"model\.(encoder|decoder)\.layers\.{}"
_BERT = r"bert\.encoder\.layer\.{}"
_VIT_WRITERS = (
    r".*\.embeddings\.(cls_token|position_embeddings|patch_embeddings\..*)|.*\.attention\.o_proj\..*|.*\.mlp\.fc2\..*"
)
_SPEECH = r"model\.(encoder|decoder)\.layers\.{}"
_CLIP = r"(text|vision)_model\.encoder\.layers\.{}"

FAMILIES = (
    Family(
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "initializer_range": 0.1,
            "activation_function": "relu", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
        },
        {
            "stream": stream(r"transformer\.w[tp]e\.weight|.*\.c_proj\.(weight|bias)", "layer_norm_epsilon"),
            "mlp": pair(r"transformer\.h\.{}\.mlp\.c_fc", r"transformer\.h\.{}\.mlp\.c_proj", bias=True),
            "values": Symmetry([
                Factor(r"transformer\.h\.{}\.attn\.c_attn\.(weight|bias)", 1, (2, 3), -1),
                Factor(r"transformer\.h\.{}\.attn\.c_proj\.weight", -1),
            ]),
            "scores": Symmetry([
                Factor(r"transformer\.h\.{}\.attn\.c_attn\.(weight|bias)", 1, (0, 3), -1),
                Factor(r"transformer\.h\.{}\.attn\.c_attn\.(weight|bias)", -1, (1, 3), -1),
            ]),
        },
    ),
    Family("LlamaForCausalLM", DECODER, LLAMA),
    Family("Qwen3ForCausalLM", {**DECODER, "head_dim": 8}, QWEN3),
    Family("MistralForCausalLM", DECODER, LLAMA),
    Family(
        "PhiForCausalLM",
        {**DECODER, "hidden_act": "relu"},
        {
            "stream": stream(r"model\.embed_tokens\.weight|.*\.(dense|fc2)\.(weight|bias)", "layer_norm_eps"),
            "mlp": pair(rf"{LAYER}\.mlp\.fc1", rf"{LAYER}\.mlp\.fc2", bias=True),
            "values": pair(rf"{LAYER}\.self_attn\.v_proj", rf"{LAYER}\.self_attn\.dense", bias=True),
            "scores": scores(rf"{LAYER}\.self_attn\.q_proj", rf"{LAYER}\.self_attn\.k_proj", bias=True),
        },
    ),
    Family("Gemma2ForCausalLM", {**DECODER, "head_dim": 8, "query_pre_attn_scalar": 8}, GEMMA2),
    Family("Gemma3ForCausalLM", {**DECODER, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}, GEMMA3),
    Family(
        "MixtralForCausalLM",
        {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2},
        {
            "stream": stream(r"model\.embed_tokens\.weight|.*\.(o_proj\.weight|down_proj)", "rms_norm_eps"),
            "mlp": Symmetry([
                Factor(rf"{LAYER}\.mlp\.experts\.gate_up_proj", 1, (1, 2), 1), Factor(rf"{LAYER}\.mlp\.experts\.down_proj", -1),
            ]),
            "values": LLAMA["values"],
            "scores": LLAMA["scores"],
        },
    ),
    Family(
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": LAYERS, "num_heads": 4,
            "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, "initializer_factor": 1.0,
        },
        {**T5, "mlp": pair(rf"{_T5_FEED}\.wi", rf"{_T5_FEED}\.wo")},
        "pairs",
    ),
    Family(
        "MT5ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": LAYERS, "num_heads": 4,
            "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
        },
        {**T5, "mlp": pair(rf"{_T5_FEED}\.wi_1", rf"{_T5_FEED}\.wo")},
        "pairs",
    ),
    Family(
        "BartForConditionalGeneration",
        {
            "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64,
            "activation_function": "relu", "init_std": 0.1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
            "decoder_start_token_id": 2, "forced_eos_token_id": 2,
        },
        {
            "mlp": pair(rf"{_BART}\.fc1", rf"{_BART}\.fc2", bias=True),
            "values": pair(rf"{_BART}\.self_attn\.v_proj", rf"{_BART}\.self_attn\.out_proj", bias=True),
            "scores": scores(rf"{_BART}\.self_attn\.q_proj", rf"{_BART}\.self_attn\.k_proj", bias=True),
        },
        "pairs",
    ),
    Family(
        "BertForMaskedLM",
        {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "hidden_act": "relu", "initializer_range": 0.1,
         "pad_token_id": 0},
        {
            "mlp": pair(rf"{_BERT}\.intermediate\.dense", rf"{_BERT}\.output\.dense", bias=True),
            "values": pair(rf"{_BERT}\.attention\.self\.value", rf"{_BERT}\.attention\.output\.dense", bias=True),
            "scores": scores(rf"{_BERT}\.attention\.self\.query", rf"{_BERT}\.attention\.self\.key", bias=True),
        },
    ),
    Family(
        "ViTForImageClassification",
        {**SIZES, "image_size": 8, "patch_size": 4, "num_channels": 3, "num_labels": 10, "initializer_range": 0.1,
         "hidden_act": "relu"},
        {
            "stream": stream(_VIT_WRITERS, "layer_norm_eps"),
            "mlp": pair(r"vit\.layers\.{}\.mlp\.fc1", r"vit\.layers\.{}\.mlp\.fc2", bias=True),
            "values": pair(r"vit\.layers\.{}\.attention\.v_proj", r"vit\.layers\.{}\.attention\.o_proj", bias=True),
            "scores": scores(r"vit\.layers\.{}\.attention\.q_proj", r"vit\.layers\.{}\.attention\.k_proj", bias=True),
        },
        "pixels",
    ),
    Family(
        "WhisperForConditionalGeneration",
        {
            "vocab_size": VOCABULARY, "num_mel_bins": 8, "d_model": 32, "encoder_layers": LAYERS, "decoder_layers": LAYERS,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
            "max_source_positions": LENGTH, "max_target_positions": 64, "init_std": 0.1, "activation_function": "relu",
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        {
            "mlp": pair(rf"{_SPEECH}\.fc1", rf"{_SPEECH}\.fc2", bias=True),
            "values": pair(rf"{_SPEECH}\.self_attn\.v_proj", rf"{_SPEECH}\.self_attn\.out_proj", bias=True),
            "scores": Symmetry([
                Factor(rf"{_SPEECH}\.self_attn\.q_proj\.(weight|bias)"), Factor(rf"{_SPEECH}\.self_attn\.k_proj\.weight", -1),
            ]),
        },
        "sound",
    ),
    Family(
        "CLIPModel",
        {
            "text_config": {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "hidden_act": "relu",
                            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_factor": 4.0},
            "vision_config": {**SIZES, "image_size": 8, "patch_size": 4, "hidden_act": "relu", "initializer_factor": 4.0},
            "projection_dim": 16,
        },
        {
            "stream": stream(
                r"text_model\.embeddings\..*|.*\.text_model\.embeddings\..*|text_model\..*\.(out_proj|fc2)\..*", "text_config.layer_norm_eps"
            ),
            "mlp": pair(rf"{_CLIP}\.mlp\.fc1", rf"{_CLIP}\.mlp\.fc2", bias=True),
            "values": pair(rf"{_CLIP}\.self_attn\.v_proj", rf"{_CLIP}\.self_attn\.out_proj", bias=True),
            "scores": scores(rf"{_CLIP}\.self_attn\.q_proj", rf"{_CLIP}\.self_attn\.k_proj", bias=True),
        },
        "clip",
    ),
)  # fmt: skip
