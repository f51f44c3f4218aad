"""Decode on a GPU: a step is one CUDA graph, and the host answers it layer by layer."""
