"""Full disks and damaged bytes end in an error of ours, whatever the format."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from service.engine.formats.registry import formats, open_model
from service.engine.schemes.registry import build_scheme
from service.errors import ArrowQuantError, DiskFull, ModelError, RequestError, StorageFailure
from tests.engine.formats.outputs import Item, Output, normal
from tests.engine.formats.test_safetensors import save

WRITABLE = [id_ for id_, cls in formats().items() if cls.can_write]
INT4 = build_scheme("int4", symmetric=False, group_size=32)
FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("format_id", WRITABLE)
@pytest.mark.parametrize("quantized", [True, False])
def test_a_full_disk_is_told_as_such(output: Callable[..., Output], format_id: str, quantized: bool) -> None:
    made = output(format_id, [Item("a.weight", normal(64, 64), INT4 if quantized else None)])
    writer = made.writer()
    # Where the first bytes go is the writer's own business: all names it may open lead to the full device.
    for name in ("model.part-00001", "model.part-00000", "model.spool-data"):
        (made.folder / name).symlink_to(FULL)

    def write() -> None:
        made.add(writer, made.items[0])
        writer.state()  # what it tells of has to be written

    with pytest.raises(DiskFull, match="no space left") as caught:
        write()
    assert str(made.folder) not in caught.value.detail
    writer.discard()


@pytest.mark.parametrize("format_id", WRITABLE)
def test_files_that_a_journal_knows_of_and_that_are_gone_are_told_of(
    output: Callable[..., Output], format_id: str
) -> None:
    made = output(format_id, [Item("a.weight", normal(64, 64), INT4)])
    writer = made.writer()
    made.add(writer, made.items[0])
    states = [writer.state()]
    writer.discard()
    for path in made.folder.iterdir():
        path.unlink()
    again = made.writer()
    with pytest.raises(StorageFailure):
        again.restore(states)
    again.discard()


@pytest.mark.parametrize("format_id", [*WRITABLE, "safetensors"])
def test_damaged_bytes_never_raise_anything_but_our_errors(
    output: Callable[..., Output], tmp_path: Path, format_id: str
) -> None:
    if format_id == "safetensors":
        folder = tmp_path / "whole"
        folder.mkdir()
        save(folder / "model.safetensors", {"a.weight": normal(8, 8), "b": normal(3)})
    else:
        made = output(format_id, [Item("a.weight", normal(8, 64), INT4), Item("b", normal(3))])
        made.run()
        folder = made.folder
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    names = sorted(p.name for p in folder.iterdir())
    for i in range(150):
        torn = shutil.copytree(folder, tmp_path / f"torn{i}")
        damage(torn / rng.choice(names), rng)
        try_to_read(torn)
        shutil.rmtree(torn)


def damage(path: Path, rng: random.Random) -> None:
    """Change, remove or insert some bytes, mostly in the header or footer."""
    data = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(min(len(data), 400)) if rng.random() < 0.5 else rng.randrange(len(data))
        kind = rng.randrange(3)
        if kind == 0:
            data[at] = rng.randrange(256)
        elif kind == 1:
            del data[at : at + rng.randint(1, 9)]
        else:
            data[at:at] = rng.randbytes(3)
    path.write_bytes(data)


def try_to_read(folder: Path) -> None:
    """Open and read all; a wrong value is no matter, a crash or a foreign error is."""
    try:
        reader = open_model(folder)
    except (ModelError, RequestError):
        return
    try:
        for info in reader.tensors:
            if info.is_float:
                with np.errstate(all="ignore"):
                    reader.rows(info, 0, info.rows)
            elif info.stored_as is None:
                reader.raw(info, 0, info.nbytes)
    except ArrowQuantError:
        pass
    finally:
        reader.close()
