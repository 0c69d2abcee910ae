"""The two networks as PyTorch modules, which training needs; running them takes only NumPy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def build(config: Mapping[str, Any]) -> nn.Module:
    """The module that a model's config.json names."""
    sizes = {name: value for name, value in config.items() if not name.startswith("_")}
    return {"DigitsDiTTransformer2DModel": DiT, "DigitsUNet2DModel": UNet}[config["_class_name"]](**sizes)


class TimeAndClass(nn.Module):
    """A vector for the timestep by sines, through two layers."""

    def __init__(self, frequencies: int, width: int) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.linear_1 = nn.Linear(frequencies, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        half = self.frequencies // 2
        steps = torch.exp(-math.log(10_000) * torch.arange(half) / half)
        angles = t[:, None].float() * steps
        return self.linear_2(F.silu(self.linear_1(torch.cat([angles.cos(), angles.sin()], dim=1))))


class Attention(nn.Module):
    """Every patch looks at all."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class Mlp(nn.Module):
    """Wider by `ratio` inside."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, ratio * width), nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and MLP, shifted, scaled and gated by timestep and class (adaLN-Zero, Peebles and Xie 2022)."""

    def __init__(self, width: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.adaln = nn.Linear(width, 6 * width)
        self.attn, self.mlp = Attention(width, heads), Mlp(width, mlp_ratio)
        nn.init.zeros_(self.adaln.weight), nn.init.zeros_(self.adaln.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaln(F.silu(c))[:, None].chunk(6, dim=-1)
        x = x + gate_a * self.attn(_modulated(x, shift_a, scale_a))
        return x + gate_m * self.mlp(_modulated(x, shift_m, scale_m))


class FinalLayer(nn.Module):
    """From each patch's vector to the noise in its pixels."""

    def __init__(self, width: int, pixels: int) -> None:
        super().__init__()
        self.adaln, self.linear = nn.Linear(width, 2 * width), nn.Linear(width, pixels)
        for layer in (self.adaln, self.linear):
            nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaln(F.silu(c))[:, None].chunk(2, dim=-1)
        return self.linear(_modulated(x, shift, scale))


class DiT(nn.Module):
    """Noise in images (n, 8, 8) at timesteps (n,), for classes (n,)."""

    def __init__(
        self, sample_size: int, patch_size: int, width: int, depth: int, heads: int, mlp_ratio: int, num_classes: int
    ) -> None:
        super().__init__()
        self.patch, self.side = patch_size, sample_size // patch_size
        self.x_embedder = nn.Linear(patch_size**2, width)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(self.side**2, width))
        self.t_embedder = TimeAndClass(width, width)
        self.y_embedder = nn.Embedding(num_classes, width)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch_size**2)

    def forward(self, images: Tensor, t: Tensor, y: Tensor) -> Tensor:
        n, s, p = len(images), self.side, self.patch
        patches = images.reshape(n, s, p, s, p).transpose(2, 3).reshape(n, s * s, p * p)
        x = self.x_embedder(patches) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        return self.final_layer(x, c).reshape(n, s, s, p, p).transpose(2, 3).reshape(n, s * p, s * p)


class ResnetBlock(nn.Module):
    """Two convolutions, with timestep and class added between them."""

    def __init__(self, channels_in: int, channels: int, width: int, norm_groups: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(norm_groups, channels_in), nn.GroupNorm(norm_groups, channels)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(width, channels)
        if channels_in != channels:
            self.conv_shortcut = nn.Conv2d(channels_in, channels, 1)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time_emb_proj(F.silu(c))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class UNet(nn.Module):
    """Noise in images (n, 8, 8) at timesteps (n,), for classes (n,), by convolutions at two sizes."""

    def __init__(self, sample_size: int, channels: list[int], width: int, norm_groups: int, num_classes: int) -> None:
        super().__init__()
        fine, coarse = channels
        assert sample_size % 2 == 0
        self.time_embedding = TimeAndClass(width, width)
        self.class_embedding = nn.Embedding(num_classes, width)
        self.conv_in = nn.Conv2d(1, fine, 3, padding=1)
        self.down = ResnetBlock(fine, fine, width, norm_groups)
        self.downsample = nn.Conv2d(fine, coarse, 3, stride=2, padding=1)
        self.mid_1 = ResnetBlock(coarse, coarse, width, norm_groups)
        self.mid_2 = ResnetBlock(coarse, coarse, width, norm_groups)
        self.upsample = nn.Conv2d(coarse, fine, 3, padding=1)
        self.up = ResnetBlock(2 * fine, fine, width, norm_groups)
        self.norm_out = nn.GroupNorm(norm_groups, fine)
        self.conv_out = nn.Conv2d(fine, 1, 3, padding=1)

    def forward(self, images: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.time_embedding(t) + self.class_embedding(y)
        fine = self.down(self.conv_in(images[:, None]), c)
        x = self.mid_2(self.mid_1(self.downsample(fine), c), c)
        x = self.upsample(F.interpolate(x, scale_factor=2.0))
        x = self.up(torch.cat([x, fine], dim=1), c)
        return self.conv_out(F.silu(self.norm_out(x)))[:, 0]


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
