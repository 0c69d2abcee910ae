"""Benchmarks: `python -m bench` runs all, `python -m bench NAME` one; results go to `bench/results/`."""
