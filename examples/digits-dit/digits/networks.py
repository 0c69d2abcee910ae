"""The two networks in NumPy: what noise is in images, at given timesteps and for given classes."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from digits.arrays import FloatArray, IntArray
from digits.layers import Layers, Tap, gelu, modulated, silu, softmax, untouched

WEIGHTS = "diffusion_pytorch_model.safetensors"


class Network(ABC):
    """A model with its weights; calling it predicts the noise."""

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, FloatArray], tap: Tap = untouched) -> None:
        self.config, self.layers = config, Layers(weights, tap)

    @abstractmethod
    def __call__(self, images: FloatArray, t: IntArray, y: IntArray) -> FloatArray:
        """The noise (n, 8, 8) in images (n, 8, 8) at timesteps t (n,), for classes y (n,)."""


class DiT(Network):
    """The diffusion transformer."""

    def __call__(self, images: FloatArray, t: IntArray, y: IntArray) -> FloatArray:
        """As `Network` says."""
        n, p = len(images), self.config["patch_size"]
        s = images.shape[1] // p
        patches = images.reshape(n, s, p, s, p).transpose(0, 1, 3, 2, 4).reshape(n, s * s, p * p)
        x = self.layers.linear("x_embedder", patches) + self.layers.weights["pos_embed"]
        c = self.layers.time("t_embedder", t, self.config["width"]) + self.layers.weights["y_embedder.weight"][y]
        c = silu(c)[:, None]  # (n, 1, width)
        for index in range(self.config["depth"]):
            x = self._block(f"blocks.{index}", x, c)
        shift, scale = np.split(self.layers.linear("final_layer.adaln", c), 2, axis=-1)
        pixels = self.layers.linear("final_layer.linear", modulated(x, shift, scale))
        return pixels.reshape(n, s, s, p, p).transpose(0, 1, 3, 2, 4).reshape(images.shape)

    def _block(self, name: str, x: FloatArray, c: FloatArray) -> FloatArray:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = np.split(
            self.layers.linear(f"{name}.adaln", c), 6, axis=-1
        )
        x = x + gate_a * self._attention(f"{name}.attn", modulated(x, shift_a, scale_a))
        inside = gelu(self.layers.linear(f"{name}.mlp.fc1", modulated(x, shift_m, scale_m)))
        return x + gate_m * self.layers.linear(f"{name}.mlp.fc2", inside)

    def _attention(self, name: str, x: FloatArray) -> FloatArray:
        n, patches, width = x.shape
        q, k, v = (
            self.layers.linear(f"{name}.{part}", x).reshape(n, patches, self.config["heads"], -1).swapaxes(1, 2)
            for part in "qkv"
        )
        looks = softmax(q @ k.swapaxes(-1, -2) / np.float32(np.sqrt(q.shape[-1])))  # (n, heads, patches, patches)
        return self.layers.linear(f"{name}.proj", (looks @ v).swapaxes(1, 2).reshape(n, patches, width))


class UNet(Network):
    """The convolutions at two sizes."""

    def __call__(self, images: FloatArray, t: IntArray, y: IntArray) -> FloatArray:
        """As `Network` says."""
        layers = self.layers
        c = layers.time("time_embedding", t, self.config["width"]) + layers.weights["class_embedding.weight"][y]
        c = silu(c)
        fine = self._resnet("down", layers.conv("conv_in", images[:, None]), c)
        x = self._resnet("mid_2", self._resnet("mid_1", layers.conv("downsample", fine, stride=2), c), c)
        x = layers.conv("upsample", x.repeat(2, axis=2).repeat(2, axis=3))
        x = self._resnet("up", np.concatenate([x, fine], axis=1), c)
        return layers.conv("conv_out", silu(self._norm("norm_out", x)))[:, 0]

    def _resnet(self, name: str, x: FloatArray, c: FloatArray) -> FloatArray:
        h = self.layers.conv(f"{name}.conv1", silu(self._norm(f"{name}.norm1", x)))
        h = h + self.layers.linear(f"{name}.time_emb_proj", c)[:, :, None, None]
        h = self.layers.conv(f"{name}.conv2", silu(self._norm(f"{name}.norm2", h)))
        is_wider = f"{name}.conv_shortcut.weight" in self.layers.weights
        return h + (self.layers.conv(f"{name}.conv_shortcut", x) if is_wider else x)

    def _norm(self, name: str, x: FloatArray) -> FloatArray:
        return self.layers.group_norm(name, x, self.config["norm_groups"])


NETWORKS: dict[str, type[Network]] = {"DigitsDiTTransformer2DModel": DiT, "DigitsUNet2DModel": UNet}


def load(folder: Path, weights: Mapping[str, FloatArray] | None = None, tap: Tap = untouched) -> Network:
    """The model in a folder, with its own weights or those given in their place."""
    config = json.loads((folder / "config.json").read_text())
    return NETWORKS[config["_class_name"]](config, weights or load_file(folder / WEIGHTS), tap)
