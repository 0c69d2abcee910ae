"""No file of a model leads out of the model roots, whatever is put in its place and whenever."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from service.errors import CorruptModel, ForbiddenPath, InvalidConfig, ModelNotFound, PickledWeights
from service.jobs.blobs import Span
from service.jobs.events import Event
from service.jobs.job import Status
from service.jobs.manager import JobManager
from service.jobs.sources import Sources
from service.jobs.tenant import DEFAULT_TENANT
from tests.jobs.models import files_below, make_long_model, make_model, quantize_request, validate_request


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A model outside the roots."""
    return make_model(tmp_path / "outside" / "secret.safetensors")


def make_index(folder: Path, *shards: str) -> Path:
    """An index that names one tensor in each of these files."""
    folder.mkdir(exist_ok=True)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {f"layers.{i}.weight": shard for i, shard in enumerate(shards)}}))
    return index


@pytest.mark.parametrize("target", ["secret.safetensors", "nothing"])
@pytest.mark.parametrize("shard", ["model-1.safetensors", "sub/secret.safetensors"])
async def test_an_index_whose_file_is_a_link_out_of_the_roots_is_forbidden_there_or_not(
    manager: JobManager, root: Path, secret: Path, shard: str, target: str
) -> None:
    index = make_index(root / "model", shard)
    if "/" in shard:
        (index.parent / "sub").symlink_to(secret.parent if target != "nothing" else secret.parent / "nothing")
    else:
        (index.parent / shard).symlink_to(secret.parent / target)
    request = quantize_request(index)
    for attempt in (manager.submit(request), manager.plans.make(request)):
        with pytest.raises(ForbiddenPath, match=Path(shard).name) as caught:
            await attempt
        assert caught.value.pointer == "/source/uri"


async def test_an_index_whose_file_is_a_link_under_the_roots_is_followed(manager: JobManager, root: Path) -> None:
    make_model(root / "blobs" / "abc.safetensors", tensors=1)
    index = make_index(root / "model", "model-1.safetensors")
    (index.parent / "model-1.safetensors").symlink_to("../blobs/abc.safetensors")
    job = await manager.submit(quantize_request(index))
    assert (await manager.jobs.wait(job.id, 30)).status is Status.SUCCEEDED


async def test_a_damaged_index_is_refused_at_once(manager: JobManager, root: Path) -> None:
    (root / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CorruptModel, match="weight_map") as caught:
        await manager.submit(quantize_request(root / "model.safetensors.index.json"))
    assert caught.value.pointer == "/source/uri"


async def test_a_file_swapped_for_a_link_before_the_job_opens_it_is_forbidden(
    manager: JobManager, root: Path, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(root / "model" / "model.safetensors")
    find = Sources._places

    def swapping(self: Sources, *about: object) -> object:
        for place in find(self, *about):  # type: ignore[arg-type]
            model.unlink()
            model.symlink_to(secret)
            yield place

    monkeypatch.setattr(Sources, "_places", swapping)
    with pytest.raises(ForbiddenPath):
        await manager.plans.make(quantize_request(model.parent))


async def test_a_companion_swapped_for_a_link_while_the_job_runs_is_not_copied(
    manager: JobManager, root: Path, tmp_path: Path
) -> None:
    folder = make_long_model(root / "model" / "model.safetensors").parent
    (folder / "tokenizer.json").write_text("{}")
    (tmp_path / "passwd").write_text("secret")
    job = await manager.submit(quantize_request(folder, config={"method": "mse"}))
    async for item in manager.jobs.follow(job.id):
        if isinstance(item, Event) and item.type == "job.progress":
            break
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(tmp_path / "passwd")
    done = await manager.jobs.wait(job.id, 60)
    assert done.error is not None
    assert (done.status, done.error.code) == (Status.FAILED, "source_changed")
    assert "tokenizer.json" in done.error.detail
    assert files_below(tmp_path / "data" / "work") == files_below(tmp_path / "data" / "artifacts") == []


async def test_a_link_put_into_an_output_does_not_make_it_a_source(
    manager: JobManager, root: Path, secret: Path
) -> None:
    model = make_model(root / "model.safetensors")
    output = {"format": "compressed-tensors", "uri": (root / "out").as_uri()}
    job = await manager.submit(quantize_request(model, outputs=[output]))
    assert (await manager.jobs.wait(job.id, 30)).status is Status.SUCCEEDED
    (root / "out" / "leak.safetensors").symlink_to(secret)
    with pytest.raises(ForbiddenPath, match=r"leak\.safetensors"):
        await manager.submit(validate_request(model, job.id))
    shutil.rmtree(root / "out")
    with pytest.raises(ModelNotFound):
        await manager.submit(validate_request(model, job.id))


@pytest.mark.parametrize("target", ["new", "empty", "sub/new", "alias/new"])
async def test_an_output_inside_its_source_is_refused(manager: JobManager, root: Path, target: str) -> None:
    folder = make_model(root / "model" / "model.safetensors").parent
    for name in ("empty", "sub"):
        (folder / name).mkdir()
    (folder / "alias").symlink_to(folder / "sub")
    output = {"format": "parquet", "uri": (folder / target).as_uri()}
    with pytest.raises(InvalidConfig, match="in the model that it is made of") as caught:
        await manager.submit(quantize_request(folder, outputs=[{"format": "compressed-tensors"}, output]))
    assert caught.value.pointer == "/outputs/1/uri"


async def test_an_output_beside_its_source_is_fine(manager: JobManager, root: Path) -> None:
    folder = make_model(root / "model" / "model.safetensors").parent
    output = {"format": "parquet", "uri": (root / "model-int4").as_uri()}
    job = await manager.submit(quantize_request(folder, outputs=[output]))
    assert (await manager.jobs.wait(job.id, 30)).status is Status.SUCCEEDED


async def test_a_folder_of_pickled_weights_is_refused_at_once(manager: JobManager, root: Path) -> None:
    (root / "model").mkdir()
    (root / "model" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (root / "model" / "config.json").write_text("{}")
    with pytest.raises(PickledWeights, match=r"pytorch_model\.bin"):
        await manager.submit(quantize_request(root / "model"))


def send(manager: JobManager, file: Path) -> str:
    """Make a file a blob; the digest that a source names."""
    data = file.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    upload = manager.blobs.begin(DEFAULT_TENANT, digest, Span(0, len(data), len(data)))
    try:
        upload.write(data)
        assert upload.finish()
    finally:
        upload.close()
    return f"sha256:{digest}"


@pytest.mark.parametrize("links", ["hard", "symbolic"])
async def test_the_links_to_blobs_are_followed_whatever_kind_the_file_system_has(
    manager: JobManager, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: str
) -> None:
    files = {"model.safetensors": send(manager, make_model(tmp_path / "mine.safetensors"))}
    (tmp_path / "tokenizer.json").write_text("{}")
    files["tokenizer.json"] = send(manager, tmp_path / "tokenizer.json")
    if links == "symbolic":

        def refuse(*_: object) -> None:
            raise OSError(errno.EPERM, "no hard links here")

        monkeypatch.setattr(os, "link", refuse)
    output = {"format": "compressed-tensors", "uri": (root / "out").as_uri()}
    request = quantize_request({"type": "blobs", "files": files}, outputs=[output])
    assert len((await manager.plans.make(request)).outputs) == 1
    job = await manager.submit(request)
    done = await manager.jobs.wait(job.id, 30)
    assert (done.status, done.error) == (Status.SUCCEEDED, None)
    assert (root / "out" / "tokenizer.json").read_text() == "{}"
    assert not (root / "out" / "tokenizer.json").is_symlink()


async def test_an_index_among_blobs_names_none_but_blobs(manager: JobManager, secret: Path, tmp_path: Path) -> None:
    index = make_index(tmp_path / "mine", f"../../../../{secret.parent.name}/{secret.name}")
    request = quantize_request({"type": "blobs", "files": {index.name: send(manager, index)}})
    with pytest.raises(ForbiddenPath):
        await manager.plans.make(request)


async def test_a_pickle_among_blobs_is_refused_at_once(manager: JobManager, tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"\x80\x04.")
    files = {"pytorch_model.bin": send(manager, tmp_path / "weights")}
    with pytest.raises(PickledWeights, match=r"pytorch_model\.bin"):
        await manager.submit(quantize_request({"type": "blobs", "files": files}))
    assert files_below(tmp_path / "data" / "work") == []
