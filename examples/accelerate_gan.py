"""Two networks, two optimizers, one scaler: a small GAN on scikit-learn's handwritten digits, in FP16 with hf_amp.

python examples/accelerate_gan.py
accelerate launch --config_file accelerate_configs/cpu_2_processes.yaml examples/accelerate_gan.py
"""

from __future__ import annotations

import argparse
import os
from itertools import pairwise

import torch
from accelerate import Accelerator, PartialState
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy
from torch.utils.data import DataLoader

import hf_amp

NOISE = 16


def network(*widths: int) -> nn.Sequential:
    """A perceptron without an activation after its last layer."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers[:-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()

    # 1,797 images of 8 by 8, from -1 to 1
    images = torch.tensor(load_digits().images, dtype=torch.float32).flatten(1) / 8 - 1
    torch.manual_seed(0)
    generator, discriminator = network(NOISE, 128, 64), network(64, 128, 1)
    optimizers = [torch.optim.Adam(n.parameters(), 5e-4, (0.5, 0.99)) for n in (generator, discriminator)]
    loader = DataLoader(images, 64, shuffle=True, drop_last=True)

    accelerator = Accelerator(
        mixed_precision=os.environ.get("ACCELERATE_MIXED_PRECISION", "fp16"),  # a config file's, else FP16
        cpu=not torch.accelerator.is_available(),  # without it accelerate makes two CPU processes two separate runs
    )
    session = hf_amp.attach(accelerator)  # the one line
    generator, discriminator, *optimizers, loader = accelerator.prepare(generator, discriminator, *optimizers, loader)
    generator_optimizer, discriminator_optimizer = optimizers

    for epoch in range(options.epochs):
        for real in loader:
            fake = generator(torch.randn(len(real), NOISE, device=real.device))

            judged = discriminator(torch.cat([real, fake.detach()]))
            truth = torch.cat([torch.ones_like(judged[: len(real)]), torch.zeros_like(judged[len(real) :])])
            discriminator_loss = cross_entropy(judged, truth)
            accelerator.backward(discriminator_loss)
            discriminator_optimizer.step()
            discriminator_optimizer.zero_grad()

            judged = discriminator(fake)
            generator_loss = cross_entropy(judged, torch.ones_like(judged))
            accelerator.backward(generator_loss)
            generator_optimizer.step()
            generator_optimizer.zero_grad()
            discriminator_optimizer.zero_grad()  # what the generator's loss has left there
        if epoch % 5 == 0 or epoch == options.epochs - 1:
            figures = session.metrics()
            accelerator.print(
                f"epoch {epoch:3d}  discriminator {discriminator_loss.item():.3f}  "
                f"generator {generator_loss.item():.3f}  scale {figures['scale']:g}  "
                f"applied {figures['applied_steps']:g}  skipped {figures['skipped_steps']:g}"
            )


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()  # not before the models are gone: gloo could wait for ever
