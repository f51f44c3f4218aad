"""Extracts text from the bytes of files of different kinds. Knows no paths and no models."""
