"""Runs benchmarks, all or the named: `python -m bench [kernels] [pipeline] [memory] …`."""

from __future__ import annotations

import argparse
import importlib

NAMES = ("kernels", "pipeline", "memory", "service", "scaling")
#: Only run when named: they take long, or ask what holds, and end with an error when something does not.
TRIALS = ("beside", "diffusion", "store", "kill", "disk_full", "streams", "uploads", "soak", "quality")


def main() -> None:
    """Each in turn; every one writes its own page."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure; results go to bench/results/.")
    known = ", ".join((*NAMES, *TRIALS))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{known}; without any, the first {len(NAMES)}")
    for name in parser.parse_args().names or NAMES:
        if name not in (*NAMES, *TRIALS):
            parser.error(f"there is no benchmark {name!r}; there are {known}")
        importlib.import_module(f"bench.{name}").main()


if __name__ == "__main__":
    main()
