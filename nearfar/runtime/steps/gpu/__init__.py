"""Decoding on a GPU: a step is one CUDA graph, the host answers it layer by layer."""
