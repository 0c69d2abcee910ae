"""Nothing is compiled twice: what `arrowquant warmup` leaves on disk serves every call of a later process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

#: Every operation on every kind of input that the kernels are told apart by, in a process of its own.
CALLS = """
import json, sys
import ml_dtypes, numpy as np
from numba.core import event
from service.engine.backends.base import Grid
from service.engine.backends.cpu import CpuBackend
from service.engine.inputs import LayerInputs
from service.engine.methods.registry import methods
from service.engine.schemes.codebook import CodebookScheme
from service.engine.schemes.float8 import Float8E4M3, Float8E5M2
from service.engine.schemes.integer import IntegerScheme
from service.engine.schemes.microscaling import Mx, NvFp4
from service.engine.schemes.nested import NestedScheme
from service.engine.tensors import FLOAT_DTYPES

def frozen(array):
    array.flags.writeable = False
    return array

with event.install_recorder("numba:compile") as compiled:
    cpu = CpuBackend(2)
    for dtype in FLOAT_DTYPES.values():
        for shape in ((3, 40), (600, 512)):
            x = frozen(np.random.default_rng(1).standard_normal(shape).astype(dtype))
            cpu.observe(x)
            for granularity in ("group", "channel", "tensor"):
                grid = Grid(np.float32(0.1), np.float32(0)) if granularity == "tensor" else None
                for scale_dtype in ("F32", "F16", "BF16"):
                    common = {"granularity": granularity, "scale_dtype": scale_dtype}
                    kinds = [(bits, symmetric) for bits in (3, 4, 8) for symmetric in (True, False)]
                    schemes = [IntegerScheme(bits=b, is_symmetric=s, **common) for b, s in kinds]
                    for scheme in [*schemes, CodebookScheme(**common)]:
                        q = cpu.quantize(x, scheme, methods()["minmax"](), grid)
                        for part in (q.packed, q.scale, q.zero_point):
                            if part is not None:
                                frozen(part)
                        cpu.compare(x, frozen(cpu.dequantize(q)))
            cpu.quantize(x, IntegerScheme(), methods()["mse"]())
            gram = np.cov(np.random.default_rng(2).standard_normal((shape[1], 800))).astype(np.float32)
            fed = LayerInputs(shape[1], gram=gram)
            for scheme in (IntegerScheme(), IntegerScheme(bits=2, is_symmetric=True), CodebookScheme()):
                for method in ("mse", "hqq", "gptq"):
                    cpu.quantize(x[:64], scheme, methods()[method](), inputs=fed)
            for scheme in (Mx(bits=8), NvFp4(tensor_scale=5.0), Float8E5M2(), Float8E4M3(granularity="block")):
                for method in ("minmax", "mse"):
                    cpu.dequantize(cpu.quantize(x, scheme, methods()[method]()))
                if scheme.granularity != "block":
                    cpu.quantize(x, scheme, methods()["mse"](), inputs=fed)
            for scheme in (NestedScheme(), NestedScheme(bits=3, group_size=32, scale_dtype="BF16")):
                for method in ("minmax", "mse"):
                    cpu.dequantize(cpu.quantize(x, scheme, methods()[method]()))
from service.engine.backends.cpu_kernels import nested_rows, nested_search
kernels = [getattr(m, n) for m, n in (
    (cpu._rows, "quantize_rows"), (cpu._rows, "dequantize_rows"), (cpu._rows, "compare_elements"),
    (cpu._search, "search_grids"), (cpu._observe, "observe_elements"), (nested_search, "search_supers"),
    (cpu._rows, "range_rows"), (nested_rows, "encode_rows"),
    (cpu._rows, "store_small_scales"), (cpu._weighted_search, "search_weighted_grids"),
)]
json.dump({"compiled": len(compiled.buffer), "signatures": [len(k.signatures) for k in kernels]}, sys.stdout)
"""


def test_after_warmup_no_call_of_another_process_compiles_anything(tmp_path: Path) -> None:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    warmed = subprocess.run(
        [sys.executable, "-m", "service", "warmup"], env=environment, capture_output=True, text=True, check=True
    )
    assert "cpu: ready after" in warmed.stdout
    assert list(tmp_path.rglob("*.nbc")), "compiled kernels are on the disk"
    called = subprocess.run([sys.executable, "-c", CALLS], env=environment, capture_output=True, text=True, check=False)
    assert called.returncode == 0, called.stderr
    assert json.loads(called.stdout) == {"compiled": 0, "signatures": [1] * 10}


def test_importing_the_service_loads_no_compiler() -> None:
    code = (
        "import sys, service, service.api.server, service.cli.local\n"
        "from service.engine.backends.registry import backends\n"
        "print(sorted(backends()), sorted(sys.modules.keys() & {'numba', 'llvmlite', 'cupy', 'torch'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith(" []\n"), done.stdout
    assert "'cpu'" in done.stdout


def test_importing_the_application_loads_nothing_that_only_some_calls_need() -> None:
    # Each of them costs a tenth of a second that every start of the server would wait for.
    heavy = {"numba", "cupy", "torch", "httpx", "rich", "obstore", "huggingface_hub", "uvicorn", "pyarrow.parquet"}
    code = f"import sys, service.api.app; print(sorted(sys.modules.keys() & {heavy!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_importing_the_application_loads_no_more_libraries_than_it_is_made_of() -> None:
    made_of = {
        "anyio",
        "fastapi",
        "ml_dtypes",
        "numpy",
        "prometheus_client",
        "pyarrow",
        "pydantic_settings",
        "uuid_utils",
    }
    theirs = {"annotated_doc", "annotated_types", "dotenv", "idna", "pydantic", "pydantic_core", "sniffio", "starlette",
              "typing_extensions", "typing_inspection", "opentelemetry"}  # fmt: skip
    code = (
        "import sys; before = set(sys.modules); import service.api.app\n"
        "files = {name: getattr(module, '__file__', None) or '' for name, module in sys.modules.items()}\n"
        "print(*{name.partition('.')[0] for name in files.keys() - before if 'site-packages' in files[name]})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = set(done.stdout.split())
    assert found >= {"numpy", "fastapi"}
    assert found - made_of - theirs == set()
