"""The arithmetic of both networks in NumPy, and the taps through which inputs of layers are seen or changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from digits.arrays import FloatArray, IntArray

#: Given a layer's name and its inputs (rows, in), gives what the layer is to see instead.
Tap = Callable[[str, FloatArray], FloatArray]


def untouched(_: str, x: FloatArray) -> FloatArray:
    """The tap that changes nothing."""
    return x


class Layers:
    """Named weights, applied; every matrix product goes through `product`, a convolution's as well."""

    def __init__(self, weights: Mapping[str, FloatArray], tap: Tap = untouched) -> None:
        self.weights, self.tap = weights, tap

    def product(self, name: str, rows: FloatArray) -> FloatArray:
        """`<name>.weight` seen as a matrix (out, in), times each of rows (m, in), and `<name>.bias`: (m, out)."""
        weight = self.weights[f"{name}.weight"]
        return self.tap(name, rows) @ weight.reshape(len(weight), -1).T + self.weights[f"{name}.bias"]

    def linear(self, name: str, x: FloatArray) -> FloatArray:
        """x (..., in) to (..., out)."""
        return self.product(name, x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)

    def conv(self, name: str, x: FloatArray, stride: int = 1) -> FloatArray:
        """x (n, in, h, w) to (n, out, h / stride, w / stride); the kernel is square and odd, the border zero."""
        kernel = self.weights[f"{name}.weight"].shape[-1]
        border = kernel // 2
        padded = np.pad(x, ((0, 0), (0, 0), (border, border), (border, border)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), axis=(2, 3))
        patches = windows[:, :, ::stride, ::stride].transpose(0, 2, 3, 1, 4, 5)  # (n, h, w, in, k, k)
        n, h, w = patches.shape[:3]
        return self.product(name, patches.reshape(n * h * w, -1)).reshape(n, h, w, -1).transpose(0, 3, 1, 2)

    def group_norm(self, name: str, x: FloatArray, groups: int) -> FloatArray:
        """x (n, channels, h, w), each group of channels with mean 0 and variance 1, then scaled and shifted."""
        spread = x.reshape(len(x), groups, -1)
        centred = spread - spread.mean(axis=-1, keepdims=True)
        normal = centred / np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + 1e-5)
        scale, shift = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return normal.reshape(x.shape) * scale[:, None, None] + shift[:, None, None]

    def time(self, name: str, t: IntArray, frequencies: int) -> FloatArray:
        """Timesteps (n,) as sines of many frequencies, through two layers: (n, out)."""
        half = frequencies // 2
        steps = np.exp(-math.log(10_000) * np.arange(half, dtype=np.float32) / half)
        angles = t[:, None].astype(np.float32) * steps
        waves = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
        return self.linear(f"{name}.linear_2", silu(self.linear(f"{name}.linear_1", waves)))


def modulated(x: FloatArray, shift: FloatArray, scale: FloatArray) -> FloatArray:
    """Each vector x (..., width) with mean 0 and variance 1, then scaled and shifted."""
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + 1e-6) * (1 + scale) + shift


def silu(x: FloatArray) -> FloatArray:
    """x times its logistic function."""
    return x / (1 + np.exp(-x))


def gelu(x: FloatArray) -> FloatArray:
    """The tanh form of it."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def softmax(x: FloatArray) -> FloatArray:
    """Along the last axis."""
    raised = np.exp(x - x.max(axis=-1, keepdims=True))
    return raised / raised.sum(axis=-1, keepdims=True)
