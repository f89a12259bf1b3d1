"""Image classification in FP32 and in FP16 with hf_amp, with a stock Trainer.

By default a small ViT learns scikit-learn's handwritten digits; nothing is downloaded:

    python examples/trainer_vision.py
    python examples/trainer_vision.py --model_name_or_path google/vit-base-patch16-224-in21k --dataset_name beans \\
        --label_column labels --learning_rate 5e-5
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_dataset
from sklearn.datasets import load_digits
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
    set_seed,
)

from hf_amp import MixedPrecisionCallback


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="a model of the hub, or a folder (default: a small ViT)")
    parser.add_argument("--dataset_name", help="a data set of the hub, or a folder of images (default: digits)")
    parser.add_argument("--dataset_config_name", help="its configuration")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="use about 5e-5 for a trained model")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/trainer_vision"))
    parser.add_argument("--amp_config", type=Path, help="YAML or JSON with options of MixedPrecisionConfig")
    return parser.parse_args()


def digits() -> Dataset:
    """1797 digits: `pixel_values` of shape [1, 8, 8] in [-1, 1], and `labels`."""
    images, labels = load_digits(return_X_y=True)
    pixels = (images.reshape(-1, 1, 8, 8) / 8 - 1).astype(np.float32)
    return Dataset.from_dict({"pixel_values": pixels.tolist(), "labels": labels.tolist()})


def data_and_labels(options: argparse.Namespace) -> tuple[Dataset, int]:
    if options.dataset_name is None:
        return digits(), 10
    processor = AutoImageProcessor.from_pretrained(options.model_name_or_path)
    rows = load_dataset(options.dataset_name, options.dataset_config_name, split="train")
    names = rows.features[options.label_column].names

    def prepared(batch: dict[str, Any]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in batch[options.image_column]]
        return {
            "pixel_values": processor(images, return_tensors="pt")["pixel_values"],
            "labels": batch[options.label_column],
        }

    return rows.with_transform(prepared), len(names)


def model(options: argparse.Namespace, labels: int) -> Any:
    set_seed(0)
    if options.model_name_or_path is not None:
        return AutoModelForImageClassification.from_pretrained(
            options.model_name_or_path, num_labels=labels, ignore_mismatched_sizes=True, dtype=torch.float32
        )
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, image_size=8,
            patch_size=2, num_channels=1, num_labels=labels,
        )
    )  # fmt: skip


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def train(precision: str, options: argparse.Namespace) -> str:
    """One run, evaluated on a fifth of the data; returns how it went."""
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
        remove_unused_columns=False,
    )
    rows, labels = data_and_labels(options)
    parts = rows.train_test_split(test_size=0.2, seed=0)
    trainer = Trainer(
        model(options, labels),
        arguments,
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
        data_collator=default_data_collator,
        compute_metrics=accuracy,
        callbacks=[callback],
    )
    trainer.train()
    measured = trainer.evaluate()
    figures = callback.session.metrics()
    return (
        f"{callback.session.describe()}: accuracy {measured['eval_accuracy']:.3f}, loss {measured['eval_loss']:.3f}, "
        f"{figures['applied_steps']:g} steps applied, {figures['skipped_steps']:g} skipped"
    )


def main() -> None:
    options = parse()
    if options.dataset_name is not None and options.model_name_or_path is None:
        raise SystemExit("--dataset_name needs --model_name_or_path, whose image processor reads it.")
    results = [train(precision, options) for precision in ("fp32", "fp16")]
    print("", *results, sep="\n")
    print(f"Look at both: tensorboard --logdir {options.output_dir}")


if __name__ == "__main__":
    main()
