"""Six tiny models that leave FP16's range in known modules, although their functions are those of ordinary models."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from tests.fallback import real_batches
from tests.fallback.real_batches import Batches

OptimizerFactory = Callable[[PreTrainedModel], torch.optim.AdamW]


@dataclass(frozen=True)
class Rescaling:
    """Factors that cancel out over a model, such as one on all that writes to a residual stream which norms read.

    Powers of two round nothing: the rescaled model then gives what the plain one gives to the last bit.

    Attributes:
        parameters: pattern of qualified parameter names → factor on the parameter, dimensionless.
        norms: pattern of qualified module names → factor by which the inputs of these norms have grown.
    """

    parameters: Mapping[str, float]
    norms: Mapping[str, float] = field(default_factory=dict)

    def apply(self, model: nn.Module) -> None:
        """Multiplies parameters in place, and the epsilon of norms, which is added to a square, by the squared factor."""
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.mul_(_matching(self.parameters, name))
        for name, module in model.named_modules():
            for epsilon in ("eps", "variance_epsilon"):
                if hasattr(module, epsilon):
                    setattr(module, epsilon, getattr(module, epsilon) * _matching(self.norms, name) ** 2)

    def parameter_groups(self, model: nn.Module, learning_rate: float) -> list[dict[str, Any]]:
        """Groups for `torch.optim.AdamW` under which the rescaled model learns what the plain one would.

        A parameter times c has gradients divided by c, and must move c times as far; AdamW moves by the learning rate
        whatever the size of the gradients, but for its epsilon (1e-8 by default).
        """
        # The plain ones come first: a Trainer logs the learning rate of the first group.
        groups: dict[float, list[nn.Parameter]] = {1.0: []}
        for name, parameter in model.named_parameters():
            groups.setdefault(_matching(self.parameters, name), []).append(parameter)
        return [
            {"params": members, "lr": learning_rate * factor, "eps": 1e-8 / factor, "weight_decay": 0.0}
            for factor, members in groups.items()
            if members
        ]


def _matching(factors: Mapping[str, float], name: str) -> float:
    """The factor of the pattern that matches the whole of `name`; 1 where none does."""
    return next((factor for pattern, factor in factors.items() if re.fullmatch(pattern, name)), 1.0)


@dataclass(frozen=True)
class RescaledModel:
    """A tiny model, what it learns, and the factors that drive some of its modules out of FP16's range.

    Attributes:
        name: of the architecture.
        make: gives the plain model; the global seed decides its parameters.
        rescaling: the factors.
        batches: seed → endless batches, on the CPU.
        learning_rate: of the plain model's parameters.
    """

    name: str
    make: Callable[[], PreTrainedModel]
    rescaling: Rescaling
    batches: Callable[[int], Batches]
    learning_rate: float

    def plain(self, seed: int) -> PreTrainedModel:
        """The ordinary model that has the same function."""
        torch.manual_seed(seed)
        return self.make()

    def build(self, seed: int) -> tuple[PreTrainedModel, Batches, OptimizerFactory]:
        """The rescaled model in training mode, its batches, and what makes its optimizer."""
        model = self.plain(seed).train()
        self.rescaling.apply(model)
        return model, self.batches(seed), self.optimizer

    def optimizer(self, model: PreTrainedModel) -> torch.optim.AdamW:
        """AdamW whose learning rates go with the factors."""
        return torch.optim.AdamW(self.rescaling.parameter_groups(model, self.learning_rate), fused=True)


def gpt2() -> GPT2LMHeadModel:
    """Two layers of width 48 over bytes."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256, n_positions=48, n_embd=48, n_layer=2, n_head=4, n_inner=96, initializer_range=0.1,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def t5() -> T5ForConditionalGeneration:
    """Two layers of width 32 on either side; embeddings and head are one tensor."""
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=256, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0,
            feed_forward_proj="relu", decoder_start_token_id=0, pad_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def llama() -> LlamaForCausalLM:
    """Two layers of width 48 with four heads on two keys."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=48, initializer_range=0.1,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def bert() -> BertForMaskedLM:
    """Two layers of width 48; the head's activation is ReLU, which a factor passes through."""
    return BertForMaskedLM(
        BertConfig(
            vocab_size=256, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
            max_position_embeddings=48, hidden_act="relu", hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, initializer_range=0.1, pad_token_id=0,
        )
    )  # fmt: skip


def vit() -> ViTForImageClassification:
    """Two layers of width 32 on patches of 4 by 4."""
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=8,
            patch_size=4, num_channels=1, num_labels=10, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, initializer_range=0.1,
        )
    )  # fmt: skip


def whisper() -> WhisperForConditionalGeneration:
    """Two layers of width 32 on either side."""
    return WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=256, num_mel_bins=real_batches.MEL_BINS, d_model=32, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
            max_source_positions=real_batches.BYTES_A_SOUND * real_batches.FRAMES_A_BYTE // 2,
            max_target_positions=real_batches.BYTES_A_SOUND, dropout=0.0, init_std=0.1,
            pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=real_batches.START_BYTE,
            suppress_tokens=None, begin_suppress_tokens=None,
        )
    )  # fmt: skip


LARGE = 2.0**21

ZOO = (
    RescaledModel(
        "GPT-2",
        gpt2,
        Rescaling({r"transformer\.w[tp]e\.weight|.*\.c_proj\.(weight|bias)": LARGE}, {r".*\.ln_(1|2|f)": LARGE}),
        real_batches.next_bytes,
        3e-3,
    ),
    RescaledModel(
        "T5",
        t5,
        Rescaling({r"encoder\.block\.1\..*\.wi\.weight": LARGE, r"encoder\.block\.1\..*\.wo\.weight": 1 / LARGE}),
        real_batches.continued_bytes,
        3e-3,
    ),
    RescaledModel(
        "Llama",
        llama,
        Rescaling(
            {r"model\.embed_tokens\.weight|.*\.(o_proj|down_proj)\.weight": LARGE}, {r"model\.norm|.*_layernorm": LARGE}
        ),
        real_batches.next_bytes,
        3e-3,
    ),
    RescaledModel(
        "BERT",
        bert,
        Rescaling({r".*\.transform\.dense\.(weight|bias)": LARGE}, {r".*\.transform\.LayerNorm": LARGE}),
        real_batches.masked_bytes,
        2e-3,
    ),
    RescaledModel(
        "ViT",
        vit,
        Rescaling(
            {r".*\.embeddings\..*|.*\.(o_proj|fc2)\.(weight|bias)": LARGE}, {r".*\.layernorm(_before|_after)?": LARGE}
        ),
        real_batches.digits,
        3e-3,
    ),
    RescaledModel(
        "Whisper",
        whisper,
        Rescaling(
            {
                r"model\.encoder\.layers\.0\.self_attn\.v_proj\.(weight|bias)": LARGE,
                r"model\.encoder\.layers\.0\.self_attn\.out_proj\.weight": 1 / LARGE,
            }
        ),
        real_batches.spoken_bytes,
        3e-3,
    ),
)
"""GPT-2, Llama and ViT: all that writes to the residual stream; T5, Whisper: a writer and its reader; BERT: one layer."""
