"""Trains both networks on scikit-learn's digits, and writes them as models for the service.

    pip install torch scikit-learn safetensors
    python examples/digits-dit/train.py [dit] [unet]

Takes a quarter of an hour on one core for both, and ends by comparing PyTorch's output with NumPy's.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from digits.schedule import TRAINED_STEPS, signal
from digits.torch_models import build
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

HERE = Path(__file__).parent
CONFIGS: dict[str, dict[str, Any]] = {
    "dit": {
        "_class_name": "DigitsDiTTransformer2DModel",
        "sample_size": 8, "patch_size": 2, "width": 128, "depth": 3, "heads": 4, "mlp_ratio": 4, "num_classes": 10,
    },
    "unet": {
        "_class_name": "DigitsUNet2DModel",
        "sample_size": 8, "channels": [32, 64], "width": 128, "norm_groups": 8, "num_classes": 10,
    },
}  # fmt: skip
STEPS, BATCH, PEAK_RATE, SMOOTHING = 3000, 128, 2e-3, 0.998
SEED = 5


def main() -> None:
    """Train, save, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(CONFIGS), help="dit, unet")
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.names:
        network = train(CONFIGS[name], arguments.steps)
        save(network, CONFIGS[name], HERE / name)
        print(f"{name}: PyTorch and NumPy differ by {difference(network, HERE / name):.1e} at most")


def train(config: dict[str, Any], steps: int) -> nn.Module:
    """The running mean of the weights over the last steps of training, which samples better than the last weights."""
    torch.manual_seed(SEED)
    network = build(config)
    averaged = copy.deepcopy(network).requires_grad_(False)
    images, labels = dataset()
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_RATE, weight_decay=0.01)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps, pct_start=0.05)
    begun, running = time.monotonic(), 0.0
    for step in range(steps):
        chosen = torch.randint(len(images), (BATCH,))
        loss = noise_loss(network, images[chosen], labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step(), rates.step()
        _average(averaged, network, min(SMOOTHING, step / (step + 10)))
        running += (loss.item() - running) * 0.01 if step else loss.item()
        if step % 250 == 249:
            print(f"step {step + 1}: loss {running:.4f}, {time.monotonic() - begun:.0f} s", flush=True)
    return averaged.eval()


def dataset() -> tuple[Tensor, Tensor]:
    """All 1,797 images (n, 8, 8) from -1 to 1, and their classes."""
    digits = load_digits()
    return torch.from_numpy(digits.images / 8 - 1).float(), torch.from_numpy(digits.target)


def noise_loss(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Mean squared error of the predicted noise, at random steps."""
    steps = torch.randint(TRAINED_STEPS, (len(images),))
    kept = torch.from_numpy(signal())[steps, None, None]
    noise = torch.randn_like(images)
    return (network(kept.sqrt() * images + (1 - kept).sqrt() * noise, steps, labels) - noise).square().mean()


def save(network: nn.Module, config: dict[str, Any], folder: Path) -> None:
    """A model folder as diffusers has them."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(network.state_dict(), folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})


def difference(network: nn.Module, folder: Path) -> float:
    """The largest difference between PyTorch's and NumPy's prediction for random images."""
    from digits.networks import load

    rng = np.random.default_rng(SEED)
    images, labels = rng.standard_normal((20, 8, 8), np.float32), np.arange(20) % 10
    steps = rng.integers(TRAINED_STEPS, size=20)
    with torch.no_grad():
        expected = network(torch.from_numpy(images), torch.from_numpy(steps), torch.from_numpy(labels)).numpy()
    return float(np.abs(load(folder)(images, steps, labels) - expected).max())


def _average(averaged: nn.Module, network: nn.Module, keep: float) -> None:
    for mean, value in zip(averaged.parameters(), network.parameters(), strict=True):
        mean.lerp_(value.detach(), 1 - keep)


if __name__ == "__main__":
    main()
