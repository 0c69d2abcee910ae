"""Runs all benchmarks, or the ones named: `python -m bench [kernels] [pipeline] [memory] [service]`."""

from __future__ import annotations

import argparse
import importlib

NAMES = ("kernels", "pipeline", "memory", "service")


def main() -> None:
    """Each in turn; every one writes its own page."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure; results go to bench/results/.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which of {', '.join(NAMES)}; by default all")
    for name in parser.parse_args().names or NAMES:
        if name not in NAMES:
            parser.error(f"there is no benchmark {name!r}; there are {', '.join(NAMES)}")
        importlib.import_module(f"bench.{name}").main()


if __name__ == "__main__":
    main()
