"""Numba kernels over far memory, each beside a NumPy reference of the same signature."""
