"""Comparisons and benchmarks: the cost and the error of each policy."""
