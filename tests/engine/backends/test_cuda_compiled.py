"""The kernels as NVIDIA's compiler takes them, and the machine code it makes; no GPU is needed for either."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from bench.gpu_code import ARCHITECTURES, SHOWN, WIDE_LOAD, Code, disassembled, installed
from service.engine.backends.cupy_device import KERNELS, OPTIONS
from tests.engine.backends.fiber_device import SOURCES


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


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_compiles_to_machine_code_without_a_warning(source: str, arch: str, cubins) -> None:
    cubin, log = cubins[source, arch]
    assert log == ""
    assert cubin.startswith(b"\x7fELF")


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_values_stay_in_registers_and_pointers_are_known_to_be_global(source: str, arch: str, cubins) -> None:
    for name, code in disassembled(cubins[source, arch][0]).items():
        assert not re.findall(r"\b(?:LDL|STL)\b.*", code), f"{name} spills to local memory"
        # A byte here and there is a zero point.
        assert not re.findall(r"\b(?:LD|ST)\.E(?!\.U8).*", code), f"{name} does not know what memory it reads"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_weights_are_read_sixteen_bytes_at_a_time_and_numbers_written_so(arch: str, cubins) -> None:
    for source, fewest in (("quantize", 2), ("quantize_many", 2), ("search", 1), ("search_many", 1), ("measure", 1)):
        for name, code in disassembled(cubins[source, arch][0]).items():
            least = 1 if name.startswith("find_rows") else fewest
            if not name.startswith("search_rows"):  # it reads a row by single elements, next to each other
                assert len(re.findall(WIDE_LOAD, code)) >= least, name
    for name, code in disassembled(cubins["dequantize", arch][0]).items():
        assert len(re.findall(r"\bSTG\.E\.(?:ENL2\.)?(?:128|256)", code)) >= 1, name


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_codes_are_made_without_fused_multiplication(arch: str, cubins) -> None:
    code = disassembled(cubins["dequantize", arch][0])["dequantize_int4"]
    assert "FMUL" in code
    assert "FFMA" not in code
    assert not re.search(r"\bF(?:MUL|ADD|MNMX)\.FTZ", code), "subnormal numbers stay what they are"


def test_the_loops_of_kernels_are_found_and_their_instructions_counted(cubins) -> None:
    for source, shown, elements in SHOWN:
        for name, text in disassembled(cubins[source, "sm_90"][0]).items():
            if re.fullmatch(shown, name):
                code = Code.parse(text)
                each = code.turn() / elements
                print(f"{name}: {each:.1f} instructions for an element")
                # A count of what is done for an element, so loose that only another way of computing breaks it.
                assert 5 < each < 80, name


def test_of_two_ways_through_a_loop_the_one_that_loads_most_is_counted() -> None:
    code = Code.parse("""
.L_x_1:
        /*0000*/                   ISETP.GE.AND P0, PT, R0, R1, PT ;
        /*0010*/              @P0 BRA `(.L_x_2) ;
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   FADD R4, R4, R5 ;
        /*0040*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0050*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
.L_x_3:
        /*0060*/              @P1 BRA `(.L_x_4) ;
        /*0070*/                   FADD R6, R4, R5 ;
        /*0080*/                   FADD R6, R6, R5 ;
.L_x_4:
        /*0090*/              @P2 BRA `(.L_x_1) ;
        /*00a0*/                   EXIT ;
""")
    assert code.loop() == (0, 9)
    assert code.turn() == 7
    assert (code.wide_loads, code.local) == (1, 0)


@pytest.mark.parametrize("wrong", ["undefined();", 'asm("no.such.instruction;");'])
def test_wrong_code_is_refused(wrong: str) -> None:
    cubin, log = compile_with_nvrtc(f'extern "C" __global__ void kernel() {{ {wrong} }}', "sm_90")
    assert not cubin, log
