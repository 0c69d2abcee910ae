"""What the machine code of the GPU kernels costs, counted and not measured: `python -m bench.gpu_code`; needs no GPU.

It takes the wheels of NVIDIA's compiler and disassembler, which are among the development dependencies.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import files
from pathlib import Path

from bench.common import note, table, write_result
from service.engine.backends.cupy_device import compile_source

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
#: Sources, the kernels of them that are shown, and how many elements a lane has in one turn of their loop.
SHOWN = (
    ("quantize", r"quantize_\w+_(int[348]|nf4)", 16),
    ("quantize_many", r"quantize_many_\w+_(int4|nf4)", 16),
    ("search", r"search_groups_\w+", 16),
    ("search_many", r"search_groups_many_\w+", 16),
    ("measure", r"compare_(f32_f32|bf16_f32)", 32),
)
WIDE_LOAD = r"\bLDG\.E\.(?:ENL2\.)?(?:128|256)"
SHUFFLE = r"\bSHFL\b"

ABOUT = """
Of the loop that a kernel spends its time in: the instructions of a lane for each element that it has in one turn, on
the way through it that loads 16 bytes at a time, finds the grids of groups of 256, and needs no exception. An H100
issues some 3e13 of them in a second, so at 38 for an element it quantizes 8e11 elements at most: from BF16 to 4 bits
those are 2.0 TB, less than it copies, and from F32 3.6 TB, more than it copies. A turn of a search is one step from one
start. *Wide loads* are those of 16 bytes or more in the whole kernel, *local* the accesses to memory that registers
were spilled to.
"""


@dataclass(frozen=True, slots=True)
class Code:
    """The instructions of a kernel, and the place of each label among them."""

    instructions: tuple[str, ...]
    labels: dict[str, int]

    @classmethod
    def parse(cls, text: str) -> Code:
        """What the disassembler prints of one kernel."""
        instructions: list[str] = []
        labels: dict[str, int] = {}
        for line in text.splitlines():
            if label := re.match(r"\s*(\.L\w+):", line):
                labels[label[1]] = len(instructions)
            elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
                instructions.append(found[1])
        return cls(tuple(instructions), labels)

    @property
    def wide_loads(self) -> int:
        """How many instructions load 16 bytes or more."""
        return sum(bool(re.search(WIDE_LOAD, text)) for text in self.instructions)

    @property
    def local(self) -> int:
        """How many go to local memory."""
        return sum(bool(re.search(r"\b(?:LDL|STL)\b", text)) for text in self.instructions)

    def target(self, at: int) -> int | None:
        """Where an instruction jumps to, if it does."""
        found = re.search(r"\bBRA\b.*`\((\.L\w+)\)", self.instructions[at])
        return self.labels.get(found[1]) if found else None

    def loop(self) -> tuple[int, int]:
        """First and last instruction of the longest loop."""
        back = ((to, at) for at in range(len(self.instructions)) if (to := self.target(at)) is not None and to < at)
        return max(back, key=lambda ends: ends[1] - ends[0])

    def turn(self) -> int:
        """Instructions of one turn of that loop: on the shortest of the ways with most wide loads and shuffles."""
        first, last = self.loop()
        # From the end: of each instruction, what lies on the best way from it on.
        best: dict[int, tuple[int, int]] = {last: (0, -1)}
        for at in range(last - 1, first - 1, -1):
            text = self.instructions[at]
            ways = [best[to] for to in self._following(at, text) if to in best]
            if ways:
                wanted, cost = max(ways)
                best[at] = wanted + bool(re.search(f"{WIDE_LOAD}|{SHUFFLE}", text)), cost - 1
        return -best[first][1]

    def _following(self, at: int, text: str) -> Iterator[int]:
        target = self.target(at)
        if target is not None and target > at:
            yield target
        is_certain = re.match(r"(?:BRA|EXIT|RET)\b", text) is not None
        if not is_certain or (target is not None and re.search(r"\bBRA(?:\.\w+)* [!U]*U?P\d", text)):
            yield at + 1


def installed(package: str, name: str) -> Path:
    """A file of an installed package."""
    found = [Path(str(file.locate())) for file in files(package) or () if file.name == name]
    if not found:
        raise FileNotFoundError(f"{package} has no {name}")
    return found[0]


def disassembled(cubin: bytes) -> dict[str, str]:
    """What the disassembler prints of every kernel, by its name."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(installed("nvidia-cuda-nvdisasm", "nvdisasm")), "--print-code", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\.text\.(\w+):$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows() -> Iterator[list[str]]:
    """Of the table, a kernel each."""
    for source, shown, elements in SHOWN:
        codes = {}
        for arch in ARCHITECTURES:
            note(f"{source} for {arch}")
            codes[arch] = {n: Code.parse(t) for n, t in disassembled(compile_source(source, arch)).items()}
        for name in sorted(codes[ARCHITECTURES[0]]):
            if re.fullmatch(shown, name):
                found = [codes[arch][name] for arch in ARCHITECTURES]
                each = [f"{code.turn() / elements:.1f}" for code in found]
                yield [name, *each, str(min(c.wide_loads for c in found)), str(max(c.local for c in found))]


def main() -> None:
    """Count, and write `results/gpu_code.md`."""
    head = ["instructions for an element", *ARCHITECTURES, "wide loads", "local"]
    packages = ["cupy-cuda12x", "nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvdisasm"]
    write_result("gpu_code", "Machine code of the GPU kernels", ABOUT, table(head, rows()), packages=packages)


if __name__ == "__main__":
    main()
