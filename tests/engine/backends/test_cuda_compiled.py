"""The kernels as NVIDIA's compiler takes them, and the machine code it makes; no GPU is needed for either."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import files
from pathlib import Path

import pytest

from service.engine.backends.cupy_device import KERNELS, OPTIONS
from tests.engine.backends.fiber_device import SOURCES

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


def installed(package: str, name: str) -> Path:
    """A file of an installed package; the wheels are among the development dependencies."""
    found = [Path(str(file.locate())) for file in files(package) or () if file.name == name]
    assert found, f"{package} has no {name}"
    return found[0]


def compile_with_nvrtc(text: str, arch: str) -> tuple[bytes, str]:
    """The CUBIN, empty if there is none, and what the compiler said."""
    nvrtc = ctypes.CDLL(str(installed("nvidia-cuda-nvrtc-cu12", "libnvrtc.so.12")))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernels.cu", 0, None, None)
    options = [option.encode() for option in (*OPTIONS, f"-arch={arch}")]
    failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))

    def fetched(what: str) -> bytes:
        getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
        return buffer.raw

    log = fetched("ProgramLog").decode().rstrip("\0")
    cubin = b"" if failed else fetched("CUBIN")
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin, log


@pytest.fixture(scope="module")
def cubins() -> Iterator[dict[tuple[str, str], tuple[bytes, str]]]:
    """Every source for every architecture."""
    wanted = [(source, arch) for source in SOURCES for arch in ARCHITECTURES]
    with ThreadPoolExecutor() as pool:
        made = pool.map(lambda w: compile_with_nvrtc((KERNELS / f"{w[0]}.cu").read_text(), w[1]), wanted)
        yield dict(zip(wanted, made, strict=True))


def kernels_of(source: str, cubin: bytes, folder: Path) -> dict[str, str]:
    """The machine code of every kernel, by its name."""
    path = folder / f"{source}.cubin"
    path.write_bytes(cubin)
    command = [str(installed("nvidia-cuda-nvdisasm", "nvdisasm")), "--print-code", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\.text\.(\w+):$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_compiles_to_machine_code_without_a_warning(source: str, arch: str, cubins) -> None:
    cubin, log = cubins[source, arch]
    assert log == ""
    assert cubin.startswith(b"\x7fELF")


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_values_stay_in_registers_and_pointers_are_known_to_be_global(
    source: str, arch: str, cubins, tmp_path: Path
) -> None:
    for name, code in kernels_of(source, cubins[source, arch][0], tmp_path).items():
        assert not re.findall(r"\b(?:LDL|STL)\b.*", code), f"{name} spills to local memory"
        # A byte here and there is a zero point.
        assert not re.findall(r"\b(?:LD|ST)\.E(?!\.U8).*", code), f"{name} does not know what memory it reads"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_weights_are_read_sixteen_bytes_at_a_time_and_numbers_written_so(arch: str, cubins, tmp_path: Path) -> None:
    for source, fewest in (("quantize", 2), ("quantize_many", 2), ("search", 1), ("search_many", 1), ("measure", 1)):
        for name, code in kernels_of(source, cubins[source, arch][0], tmp_path).items():
            if not name.startswith(("find_rows", "search_rows")):  # other reads than these count
                assert len(re.findall(r"\bLDG\.E\.(?:ENL2\.)?(?:128|256)", code)) >= fewest, name
    for name, code in kernels_of("dequantize", cubins["dequantize", arch][0], tmp_path).items():
        assert len(re.findall(r"\bSTG\.E\.(?:ENL2\.)?(?:128|256)", code)) >= 1, name


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_codes_are_made_without_fused_multiplication(arch: str, cubins, tmp_path: Path) -> None:
    code = kernels_of("dequantize", cubins["dequantize", arch][0], tmp_path)["dequantize_int4"]
    assert "FMUL" in code
    assert "FFMA" not in code
    assert not re.search(r"\bF(?:MUL|ADD|MNMX)\.FTZ", code), "subnormal numbers stay what they are"


@pytest.mark.parametrize("wrong", ["undefined();", 'asm("no.such.instruction;");'])
def test_wrong_code_is_refused(wrong: str) -> None:
    cubin, log = compile_with_nvrtc(f'extern "C" __global__ void kernel() {{ {wrong} }}', "sm_90")
    assert not cubin, log
