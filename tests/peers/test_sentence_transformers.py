"""sentence-transformers: trainers whose loss is a module around the model, and whose models add to their batch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    set_seed,
)

from hf_amp import EventKind, MixedPrecisionCallback
from tests.fallback.rescaled import Rescaling
from tests.reference import assert_bitwise_equal

st = pytest.importorskip(
    "sentence_transformers", reason="needs sentence-transformers, which the extra hf_amp[peers] brings"
)
losses = st.sentence_transformer.losses
modules = st.sentence_transformer.modules

pytestmark = pytest.mark.usefixtures("fresh_accelerator_state")
SENTENCES = [
    sentence
    for topic in sorted(topics)[:40]
    for sentence in re.split(r"[.:]\s+", topics[topic].replace("\n", " "))
    if 20 < len(sentence) < 100
][:128]
LARGE = 2.0**21
OVERFLOWS = Rescaling(
    {r".*layer\.1\.intermediate\.dense\.(weight|bias)": LARGE, r".*layer\.1\.output\.dense\.weight": 1 / LARGE}
)
LAYERS = ("intermediate.dense", "output.dense")
SKIPPED = EventKind.STEP_SKIPPED


def saved(folder: Path, architecture: Any = BertModel) -> str:
    """A folder with two layers of width 32, without dropout, and a tokenizer of whole words."""
    set_seed(0)
    words = sorted(set(re.findall(r"\w+|[^\w\s]", " ".join(SENTENCES))))
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    inner = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), tokens, strict=False))
    PreTrainedTokenizerFast(
        tokenizer_object=inner, model_max_length=32, **{f"{name}_token": token for name, token in names.items()}
    ).save_pretrained(folder)
    architecture(
        BertConfig(
            vocab_size=len(tokens), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=32, hidden_act="relu", hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, initializer_range=0.1, pad_token_id=0, num_labels=1,
        )
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def embedder(folder: Path) -> Any:
    """Means of the last layer's outputs."""
    return st.SentenceTransformer(modules=[modules.Transformer(saved(folder)), modules.Pooling(32)])


def pairs(**columns: list[Any]) -> Dataset:
    """The halves of sentences belong together."""
    halves = [(s[: len(s) // 2], s[len(s) // 2 :]) for s in SENTENCES]
    return Dataset.from_dict({"anchor": [a for a, _ in halves], "positive": [b for _, b in halves], **columns})


def trained(
    folder: Path,
    model: Any,
    loss: Any,
    data: Any,
    callback: MixedPrecisionCallback | None = None,
    kind: str = "SentenceTransformer",
    **options: Any,
) -> Any:
    """A stock trainer of that library after four steps."""
    arguments = getattr(st, f"{kind}TrainingArguments")(
        str(folder / "run"), use_cpu=True, max_steps=4, per_device_train_batch_size=8, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, learning_rate=1e-3, **options,
    )  # fmt: skip
    trainer = getattr(st, f"{kind}Trainer")(
        model, arguments, train_dataset=data, loss=loss, callbacks=[callback] if callback else None
    )
    trainer.train()
    return trainer


def matryoshka(model: Any, loss: Any) -> Any:
    return losses.MatryoshkaLoss(model, loss, [32, 8])


def cached(model: Any) -> Any:
    return losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=4)


LOSSES: dict[str, Callable[[Any], Any]] = {
    "plain": losses.MultipleNegativesRankingLoss,
    "cached Matryoshka": lambda model: matryoshka(model, cached(model)),
}
OUTER_AND_INNER = pytest.mark.parametrize("loss", ["plain", "cached Matryoshka"])
"""One that is a loss and nothing else, and one around another that runs backward passes of its own."""


@OUTER_AND_INNER
def test_a_run_in_fp32_is_the_same_to_the_last_bit(loss: str, tmp_path: Path) -> None:
    """Also where the loss runs backward passes of its own, from a hook of the outer one."""
    weights = []
    for callback in (MixedPrecisionCallback(), None):
        model = embedder(tmp_path / "model")
        trained(tmp_path, model, LOSSES[loss](model), pairs(), callback)
        weights.append([p.detach() for p in model.parameters()])
    assert_bitwise_equal(*weights)


@OUTER_AND_INNER
def test_the_modules_that_overflow_are_named(loss: str, tmp_path: Path) -> None:
    """By their names in the model, from the batch as it came, to which the model adds; after one step it learns."""
    model = embedder(tmp_path / "model")
    OVERFLOWS.apply(model)
    callback = MixedPrecisionCallback({"init_scale": 64.0})
    trained(tmp_path, model, LOSSES[loss](model), pairs(), callback, fp16=True)
    (skip,) = [event for event in callback.session.events if event.kind is SKIPPED]
    assert (skip.step, skip.cause) == (1, "ACTIVATION")
    assert skip.modules == tuple(f"0.model.encoder.layer.1.{layer}" for layer in LAYERS)
    assert set(callback.session.plan.modules) == set(skip.modules)
    assert callback.session.metrics()["applied_steps"] == 3


def test_fp16_learns_as_fp32_does(tmp_path: Path) -> None:
    """Loss and gradient norm, before clipping, of every step, also where the loss goes through its batch in parts."""
    logged = []
    for fp16 in (True, False):
        model = embedder(tmp_path / "model")
        callback = MixedPrecisionCallback({"init_scale": 64.0})
        trainer = trained(tmp_path, model, cached(model), pairs(), callback, fp16=fp16)
        entries = [entry for entry in trainer.state.log_history if "loss" in entry]
        logged.append([number for entry in entries for number in (entry["loss"], entry["grad_norm"])])
    assert len(logged[0]) == 8
    assert logged[0] == pytest.approx(logged[1], rel=0.01)


def in_order(dataset: Dataset, batch_size: int, drop_last: bool, **_: Any) -> Any:
    """A batch sampler that does not shuffle."""
    sampler = torch.utils.data.SequentialSampler(dataset)
    return st.base.sampler.DefaultBatchSampler(sampler, batch_size, drop_last)


def test_a_bad_label_is_a_matter_of_the_loss(tmp_path: Path) -> None:
    """The model, which does not see it, is not blamed; only its step is lost. Two data sets with a loss each."""
    model = embedder(tmp_path / "model")
    data = {"a": pairs(), "b": pairs(score=[math.nan, *[0.5] * 127])}
    both = {"a": losses.MultipleNegativesRankingLoss(model), "b": losses.CosineSimilarityLoss(model)}
    callback = MixedPrecisionCallback({"init_scale": 64.0})
    options = {"multi_dataset_batch_sampler": "round_robin", "batch_sampler": in_order}
    trained(tmp_path, model, both, data, callback, fp16=True, **options)
    skips = [event for event in callback.session.events if event.kind is SKIPPED]
    assert [(skip.step, skip.cause) for skip in skips] == [(2, "LOSS")]
    assert "labels" in skips[0].message
    assert not callback.session.plan.modules


def cross_encoder(folder: Path) -> tuple[Any, Any, str]:
    """Scores both halves in one forward pass, in mini-batches."""
    from sentence_transformers.cross_encoder.losses import CachedMultipleNegativesRankingLoss

    model = st.CrossEncoder(saved(folder, BertForSequenceClassification), num_labels=1)
    return model, CachedMultipleNegativesRankingLoss(model, mini_batch_size=4), "CrossEncoder"


def sparse_encoder(folder: Path) -> tuple[Any, Any, str]:
    """Largest logit of every word, and a loss around a loss."""
    from sentence_transformers.sparse_encoder import losses as sparse
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    words = modules.Transformer(saved(folder, BertForMaskedLM), transformer_task="fill-mask")
    model = st.SparseEncoder(modules=[words, SpladePooling("max")])
    ranking = sparse.SparseMultipleNegativesRankingLoss(model)
    return model, sparse.SpladeLoss(model, ranking, 3e-3, 5e-3), "SparseEncoder"


@pytest.mark.parametrize("make", [cross_encoder, sparse_encoder])
def test_the_other_trainers_name_them_too(make: Callable[[Path], tuple[Any, Any, str]], tmp_path: Path) -> None:
    """And go on after one step."""
    model, loss, kind = make(tmp_path / "model")
    OVERFLOWS.apply(model)
    callback = MixedPrecisionCallback({"init_scale": 64.0})
    trained(tmp_path, model, loss, pairs(), callback, kind, fp16=True)
    (skip,) = [event for event in callback.session.events if event.kind is SKIPPED]
    assert skip.modules == tuple(f"0.model.bert.encoder.layer.1.{layer}" for layer in LAYERS)
    assert callback.session.metrics()["applied_steps"] == 3
