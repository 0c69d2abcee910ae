"""Draws images with DDIM (Song et al. 2020): from noise, in a few of the trained steps, without more noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from digits.arrays import FloatArray, IntArray
from digits.networks import Network
from digits.schedule import sampling_steps, signal

#: Told before each step which it is, counted from the noise.
OnStep = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Drawing:
    """A sampling run: the images that the network saw, the noise it predicted in them, and what came of it."""

    labels: IntArray  # (n,)
    steps: IntArray  # (steps,): the trained step of each
    seen: FloatArray  # (steps, n, 8, 8)
    noise: FloatArray  # (steps, n, 8, 8)
    images: FloatArray  # (n, 8, 8), from -1 to 1


def labels_for(count: int) -> IntArray:
    """All classes in turn."""
    return np.arange(count) % 10


def sample(network: Network, labels: IntArray, steps: int, seed: int, on_step: OnStep = lambda _: None) -> Drawing:
    """Draw an image for each label; equal seeds begin with equal noise."""
    x = np.random.default_rng(seed).standard_normal((len(labels), 8, 8), np.float32)
    taken, kept = sampling_steps(steps), signal()
    seen, predicted = [], []
    for index, step in enumerate(taken):
        on_step(index)
        noise = network(x, np.full(len(labels), step), labels)
        seen.append(x), predicted.append(noise)
        after = kept[taken[index + 1]] if index + 1 < steps else np.float32(1)
        image = np.clip((x - np.sqrt(1 - kept[step]) * noise) / np.sqrt(kept[step]), -1, 1)
        noise_left = (x - np.sqrt(kept[step]) * image) / np.sqrt(1 - kept[step])
        x = np.sqrt(after) * image + np.sqrt(1 - after) * noise_left
    return Drawing(labels, taken, np.stack(seen), np.stack(predicted), x)


def predict_along(network: Network, run: Drawing, on_step: OnStep = lambda _: None) -> FloatArray:
    """The noise (steps, n, 8, 8) that another network predicts in what a run saw."""
    predicted = []
    for index, (step, x) in enumerate(zip(run.steps, run.seen, strict=True)):
        on_step(index)
        predicted.append(network(x, np.full(len(x), step), run.labels))
    return np.stack(predicted)


def relative_error(exact: FloatArray, other: FloatArray) -> float:
    """Distance of all of them together, as a share of the exact one's length."""
    return float(np.linalg.norm((other - exact).ravel()) / np.linalg.norm(exact.ravel()))
