"""Numba kernels of the `cpu` backend; imported only when one is used."""
