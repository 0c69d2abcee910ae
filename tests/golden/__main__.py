"""Writes the golden files anew: `python -m tests.golden`."""

from __future__ import annotations

from tests.golden.cases import FOLDER, cases, record, weights

if __name__ == "__main__":
    for case in cases():
        path = FOLDER / f"{case.name}.safetensors"
        path.write_bytes(record(case, weights()))
        print(path.name)
