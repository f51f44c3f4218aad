"""The engine: model, near and far stores, prefill, decode, sampling, accounting."""
