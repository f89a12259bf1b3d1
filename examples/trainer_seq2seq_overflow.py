"""A T5 that overflows FP16 whatever the loss scale, and trains all the same: one module runs in FP32.

By default a small T5 over bytes continues help topics that every CPython ships. One of its feed-forward layers writes
values beyond 65504, as those of trained T5s do, which changes nothing in FP32. Nothing is downloaded:

    python examples/trainer_seq2seq_overflow.py
    python examples/trainer_seq2seq_overflow.py --model_name_or_path google-t5/t5-small --dataset_name knkarthick/samsum \\
        --source_column dialogue --target_column summary --learning_rate 1e-4
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from datasets import Dataset, load_dataset
from torch import nn
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    default_data_collator,
    set_seed,
)

from hf_amp import MixedPrecisionCallback

LARGE = "encoder.block.1.layer.1.DenseReluDense.wo"
"""The layer that leaves the range of FP16."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="a model of the hub, or a folder (default: a small T5)")
    parser.add_argument("--dataset_name", help="a data set of the hub, or a folder (default: help topics)")
    parser.add_argument("--dataset_config_name", help="its configuration")
    parser.add_argument("--source_column", default="source")
    parser.add_argument("--target_column", default="target")
    parser.add_argument("--block_size", type=int, default=64, help="tokens of the source, and of the target")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="use about 1e-4 for a trained model")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/trainer_seq2seq_overflow"))
    parser.add_argument("--amp_config", type=Path, help="YAML or JSON with options of MixedPrecisionConfig")
    return parser.parse_args()


@torch.no_grad()
def enlarge_residual_stream(model: T5ForConditionalGeneration, factor: float) -> None:
    """Multiplies all that is written to the residual stream, which every layer normalises before it reads it.

    The function stays the same: RMSNorm(c x) = RMSNorm(x). One layer is made to write eight times as much before, so
    that it is the first to leave the range.
    """
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())  # tied to the embeddings until here
    model.get_submodule(LARGE).weight.mul_(8.0)
    model.shared.weight.mul_(factor)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith((".o", ".wo")):
            module.weight.mul_(factor)


def model_and_tokenizer(options: argparse.Namespace) -> tuple[Any, Any]:
    set_seed(0)
    if options.model_name_or_path is not None:
        tokenizer = AutoTokenizer.from_pretrained(options.model_name_or_path)
        return AutoModelForSeq2SeqLM.from_pretrained(options.model_name_or_path, dtype=torch.float32), tokenizer
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=256, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0,
        )
    )  # fmt: skip
    enlarge_residual_stream(model, 5e3)
    return model, None


def data(options: argparse.Namespace, tokenizer: Any) -> Dataset:
    size = options.block_size
    if tokenizer is None:
        text = list("\n".join(topics[name] for name in sorted(topics)).encode())
        starts = range(0, len(text) - 2 * size + 1, 2 * size)
        sources, targets = ([text[start + shift : start + shift + size] for start in starts] for shift in (0, size))
        return Dataset.from_dict({"input_ids": sources, "labels": targets})
    rows = load_dataset(options.dataset_name, options.dataset_config_name, split="train")

    def tokenized(batch: dict[str, list[str]]) -> Any:
        return tokenizer(
            batch[options.source_column], text_target=batch[options.target_column], max_length=size, truncation=True
        )

    return rows.map(tokenized, batched=True, remove_columns=rows.column_names)


def train(name: str, fp16: bool, fallback: bool, options: argparse.Namespace) -> str:
    """One run; returns how it went."""
    model, tokenizer = model_and_tokenizer(options)
    callback = MixedPrecisionCallback({"automatic_fallback": fallback})
    if fallback and options.amp_config is not None:
        callback = MixedPrecisionCallback(options.amp_config)
    arguments = Seq2SeqTrainingArguments(
        str(options.output_dir / name.replace(" ", "_")),
        fp16=fp16,
        use_cpu=not torch.cuda.is_available(),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        logging_steps=max(1, options.steps // 10),
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="tensorboard",
        disable_tqdm=True,
    )
    trainer = Seq2SeqTrainer(
        model,
        arguments,
        train_dataset=data(options, tokenizer),
        data_collator=default_data_collator if tokenizer is None else DataCollatorForSeq2Seq(tokenizer, model),
        callbacks=[callback],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    figures, plan = callback.session.metrics(), callback.session.plan
    modules = f"; in FP32: {', '.join(plan.modules)}" if plan.modules else ""
    return (
        f"{name}: last loss {losses[-1]:.3f}, {figures['applied_steps']:g} steps applied, "
        f"{figures['skipped_steps']:g} skipped; ended in {plan.default.value}{modules}"
    )


def main() -> None:
    options = parse()
    if (options.dataset_name is None) != (options.model_name_or_path is None):
        raise SystemExit("--dataset_name and --model_name_or_path go together: the tokenizer reads the data.")
    results = [
        train("FP32", fp16=False, fallback=True, options=options),
        train("FP16 without fallback", fp16=True, fallback=False, options=options),
        train("FP16 with hf_amp", fp16=True, fallback=True, options=options),
    ]
    print("", *results, sep="\n")
    print(f"Look at it: cat {options.output_dir}/*/amp_events.jsonl")


if __name__ == "__main__":
    main()
