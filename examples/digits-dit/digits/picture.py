"""Draws the images of several runs below each other, and errors along the run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from digits.arrays import FloatArray, IntArray

WIDTH, DPI = 10.0, 110
IMAGES_ACROSS = 20


def draw(rows: Mapping[str, FloatArray], curves: Mapping[str, FloatArray], steps: IntArray, path: Path) -> None:
    """A PNG: for each of `rows` the first of its images (n, 8, 8), and for each of `curves` an error at each step."""
    from matplotlib.figure import Figure  # takes a second

    heights = [0.55 * len(rows), 3.2]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    above, below = figure.subplots(2, height_ratios=heights)
    # A pixel of black between images, two between rows.
    lines = [np.pad(images[:IMAGES_ACROSS], ((0, 0), (1, 1), (0, 1)), constant_values=-1) for images in rows.values()]
    above.imshow(np.concatenate([np.concatenate(list(line), axis=1) for line in lines]), cmap="gray", vmin=-1, vmax=1)
    above.set_yticks(5 + 10 * np.arange(len(rows)), list(rows), fontsize=8)
    above.set_xticks([])
    for name, errors in curves.items():
        below.plot(steps, errors, label=name)
    below.invert_xaxis()
    below.set_yscale("log")
    below.set_xlabel("timestep, from noise to image", fontsize=8)
    below.set_ylabel("relative error of the predicted noise", fontsize=8)
    below.legend(fontsize=8)
    below.spines[["top", "right"]].set_visible(False)
    # Without the name of a release, so that the same figures are the same file.
    figure.savefig(path, format="png", dpi=DPI, metadata={"Software": None})
