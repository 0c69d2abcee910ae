"""What importing the service costs, in seconds of the processor: without the start and the end of the process."""

from __future__ import annotations

import os
import subprocess
import sys

from bench.common import Samples

REPEATS = 7
SERVICE = "import service.api.app"
#: What it could not do without, and what that costs alone.
LIBRARIES = "import numpy, ml_dtypes, pyarrow, fastapi, pydantic"


def cpu(code: str) -> Samples:
    """Of this in a fresh interpreter, on all of its threads; compiled files are there."""
    _cpu(code)
    return Samples(tuple(_cpu(code) for _ in range(REPEATS)))


def _cpu(code: str) -> float:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    timed = f"import time; begun = time.process_time(); {code}; print(time.process_time() - begun)"
    done = subprocess.run([sys.executable, "-c", timed], check=True, env=environment, stdout=subprocess.PIPE, text=True)
    return float(done.stdout)
