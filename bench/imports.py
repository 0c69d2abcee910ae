"""What importing the service costs, in seconds of the processor."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

from bench.common import Samples

REPEATS = 7
SERVICE = "import service.api.app"
#: What it could not do without, and what that costs alone.
LIBRARIES = "import numpy, ml_dtypes, pyarrow, fastapi, pydantic"


def cpu(code: str) -> Samples:
    """Of a fresh interpreter that runs this, less what one that runs nothing takes; compiled files are there."""
    empty = _cpu("pass")
    _cpu(code)
    return Samples(tuple(_cpu(code) - empty for _ in range(REPEATS)))


def _cpu(code: str) -> float:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
