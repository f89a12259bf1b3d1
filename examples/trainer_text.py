"""Language modelling in FP32 and in FP16 with hf_amp, with a stock Trainer.

By default a small GPT-2 over bytes learns the help topics that every CPython ships; nothing is downloaded:

    python examples/trainer_text.py
    python examples/trainer_text.py --model_name_or_path distilbert/distilgpt2 --dataset_name Salesforce/wikitext \\
        --dataset_config_name wikitext-2-raw-v1
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_amp import MixedPrecisionCallback


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="a model of the hub, or a folder (default: a small GPT-2)")
    parser.add_argument("--dataset_name", help="a data set of the hub, or a folder (default: help topics)")
    parser.add_argument("--dataset_config_name", help="its configuration")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--block_size", type=int, default=128, help="tokens in a row")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="use about 5e-5 for a trained model")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/trainer_text"))
    parser.add_argument("--amp_config", type=Path, help="YAML or JSON with options of MixedPrecisionConfig")
    return parser.parse_args()


def blocks(tokens: list[int], size: int) -> Dataset:
    """Rows of `size` tokens; labels are the same."""
    rows = [tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def data(options: argparse.Namespace) -> Dataset:
    if options.dataset_name is None:
        return blocks(list("\n".join(topics[name] for name in sorted(topics)).encode()), options.block_size)
    tokenizer = AutoTokenizer.from_pretrained(options.model_name_or_path)
    texts = load_dataset(options.dataset_name, options.dataset_config_name, split="train")
    tokens = tokenizer("\n".join(texts[options.text_column]), verbose=False)["input_ids"]
    return blocks(tokens, options.block_size)


def model(options: argparse.Namespace) -> Any:
    set_seed(0)
    if options.model_name_or_path is not None:
        # Trained parameters stay FP32: what the checkpoint was saved in may be too narrow to train in.
        return AutoModelForCausalLM.from_pretrained(options.model_name_or_path, dtype=torch.float32)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256, n_positions=options.block_size, n_embd=96, n_layer=3, n_head=4, bos_token_id=0,
            eos_token_id=0,
        )
    )  # fmt: skip


def train(precision: str, options: argparse.Namespace) -> str:
    """One run; returns how it went."""
    callback = MixedPrecisionCallback(options.amp_config)
    arguments = TrainingArguments(
        str(options.output_dir / precision),
        fp16=precision == "fp16",
        use_cpu=not torch.cuda.is_available(),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(20, options.steps // 5),
        logging_steps=max(1, options.steps // 10),
        save_strategy="no",
        report_to="tensorboard",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model(options),
        arguments,
        train_dataset=data(options),
        data_collator=default_data_collator,
        callbacks=[callback],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    figures = callback.session.metrics()
    return (
        f"{callback.session.describe()}: loss {losses[0]:.3f} -> {losses[-1]:.3f}, "
        f"{figures['applied_steps']:g} steps applied, {figures['skipped_steps']:g} skipped"
    )


def main() -> None:
    options = parse()
    if options.dataset_name is not None and options.model_name_or_path is None:
        raise SystemExit("--dataset_name needs --model_name_or_path, whose tokenizer reads it.")
    results = [train(precision, options) for precision in ("fp32", "fp16")]
    print("", *results, sep="\n")
    print(f"Look at both: tensorboard --logdir {options.output_dir}")


if __name__ == "__main__":
    main()
