"""LoRA adapters in FP32 on a frozen FP16 base, with hf_amp, with a stock Trainer.

The base takes half the memory, the adapters keep the precision that small updates need. By default a small GPT-2 over
bytes learns English help topics in FP32 first, and adapters for Python source on top of it; nothing is downloaded:

    python examples/trainer_lora.py
    python examples/trainer_lora.py --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name yahma/alpaca-cleaned \\
        --text_column output --target_modules q_proj v_proj --learning_rate 2e-4
"""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
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
    parser.add_argument("--dataset_name", help="a data set of the hub, or a folder (default: Python source)")
    parser.add_argument("--dataset_config_name", help="its configuration")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--target_modules", nargs="+", default=["c_attn", "c_fc"], help="layers to adapt")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--block_size", type=int, default=128, help="tokens in a row")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning_rate", type=float, default=5e-3)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/trainer_lora"))
    parser.add_argument("--amp_config", type=Path, help="YAML or JSON with options of MixedPrecisionConfig")
    return parser.parse_args()


def blocks(tokens: list[int], size: int) -> Dataset:
    """Rows of `size` tokens; labels are the same."""
    rows = [tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def english(size: int) -> Dataset:
    return blocks(list("\n".join(topics[name] for name in sorted(topics)).encode()), size)


def data(options: argparse.Namespace) -> Dataset:
    if options.dataset_name is None:
        sources = [inspect.getsource(module) for module in (argparse, inspect)]
        return blocks(list("\n".join(sources).encode()), options.block_size)
    tokenizer = AutoTokenizer.from_pretrained(options.model_name_or_path)
    texts = load_dataset(options.dataset_name, options.dataset_config_name, split="train")
    tokens = tokenizer("\n".join(texts[options.text_column]), verbose=False)["input_ids"]
    return blocks(tokens, options.block_size)


def train(name: str, model: Any, rows: Dataset, fp16: bool, options: argparse.Namespace) -> str:
    """One run; returns how it went."""
    callback = MixedPrecisionCallback(options.amp_config)
    arguments = TrainingArguments(
        str(options.output_dir / name),
        fp16=fp16,
        use_cpu=not torch.cuda.is_available(),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate if fp16 else 2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=min(20, options.steps // 5),
        logging_steps=max(1, options.steps // 10),
        save_strategy="steps" if fp16 else "no",
        save_steps=options.steps,
        report_to="tensorboard",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=default_data_collator, callbacks=[callback])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    figures = callback.session.metrics()
    return (
        f"{name}: {callback.session.describe()}: loss {losses[0]:.3f} -> {losses[-1]:.3f}, "
        f"{figures['applied_steps']:g} steps applied, {figures['skipped_steps']:g} skipped"
    )


def main() -> None:
    options = parse()
    if options.dataset_name is not None and options.model_name_or_path is None:
        raise SystemExit("--dataset_name needs --model_name_or_path, whose tokenizer reads it.")
    set_seed(0)
    results = []
    if options.model_name_or_path is not None:
        base = AutoModelForCausalLM.from_pretrained(options.model_name_or_path, dtype=torch.float16)
    else:
        shape = GPT2Config(
            vocab_size=256, n_positions=options.block_size, n_embd=96, n_layer=3, n_head=4, bos_token_id=0,
            eos_token_id=0,
        )  # fmt: skip
        base = GPT2LMHeadModel(shape)
        results.append(train("base", base, english(options.block_size), fp16=False, options=options))
        base = base.half()
    adapters = LoraConfig(r=options.rank, target_modules=options.target_modules, task_type="CAUSAL_LM")
    model = get_peft_model(base, adapters)  # peft makes adapters FP32
    results.append(train("adapters", model, data(options), fp16=True, options=options))
    print("", *results, sep="\n")
    print(f"Adapters: {options.output_dir / 'adapters' / f'checkpoint-{options.steps}'}")


if __name__ == "__main__":
    main()
