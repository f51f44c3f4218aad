"""Comparisons and benchmarks: what each policy costs and what it loses."""
