"""Computations on the device of near memory: Triton kernels and plain tensor code."""
