"""Locality-sensitive hashing: tables, codes, sampling laws and their float64 references."""
