"""Long-context LLM inference on a GPU that is too small for the KV cache."""
