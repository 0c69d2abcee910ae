"""How much of an image is left at each step of noising, and which steps a sampler takes."""

from __future__ import annotations

import numpy as np

from digits.arrays import FloatArray

TRAINED_STEPS = 1000


def signal(steps: int = TRAINED_STEPS) -> FloatArray:
    """The cosine schedule's share of the image's variance at each step: float32 (steps,), falling (Nichol 2021)."""
    at = (np.arange(steps + 1) / steps + 0.008) / 1.008
    kept = np.cos(at * np.pi / 2) ** 2
    kept_in_step = np.maximum(kept[1:] / kept[:-1], 1 - 0.999)
    return np.cumprod(kept_in_step).astype(np.float32)


def sampling_steps(count: int) -> np.ndarray:
    """`count` of the trained steps, evenly, in the order of sampling: from noise to image, int64 (count,).

    From the last trained one on, as Lin et al. 2023 say it should be; nothing is predicted of images without noise.
    """
    return np.arange(count, 0, -1) * TRAINED_STEPS // count - 1
