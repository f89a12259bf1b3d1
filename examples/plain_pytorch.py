"""A loop of plain PyTorch with the scaler, monitor and tracker of hf_amp in it: handwritten digits, in FP16.

python examples/plain_pytorch.py
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from hf_amp import AdvancedGradScaler, MixedPrecisionConfig, PerformanceTracker, PrecisionMonitor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU: its half kernels

    digits = load_digits()  # 1,797 images of 8 by 8; comes with scikit-learn
    images = torch.tensor(digits.images, dtype=torch.float32, device=device).flatten(1) / 16
    labels = torch.tensor(digits.target, device=device)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    config = MixedPrecisionConfig(scaling_strategy="ADAPTIVE")
    scaler = AdvancedGradScaler(config)  # in the place of torch.amp.GradScaler
    monitor, tracker = PrecisionMonitor(config), PerformanceTracker(config)

    for step in range(1, options.steps + 1):
        chosen = torch.randint(len(images), (64,), device=device)
        with tracker.step(samples=64):
            optimizer.zero_grad()
            with torch.autocast(device, torch.float16):
                loss = cross_entropy(model(images[chosen]), labels[chosen])
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        monitor.update_metrics(scaler, loss, step)

    with torch.no_grad():
        accuracy = (model(images).argmax(1) == labels).float().mean()
    precision, performance = monitor.get_precision_stats(), tracker.get_stats()
    scale = precision["gradient_scale"]
    print(f"mean loss {precision['avg_loss']:.3f}, {accuracy:.1%} of the digits right")
    print(f"{precision['applied_steps']} steps applied, {precision['skipped_steps']} skipped")
    print(f"scale {scale['current']:g}, {scale['changes']} changes, volatility {scale['volatility_bits']:.1f} bits")
    print(f"{performance['avg_step_time'] * 1000:.2f} ms a step, 99% within {performance['step_time_p99'] * 1000:.2f}")


if __name__ == "__main__":
    main()
