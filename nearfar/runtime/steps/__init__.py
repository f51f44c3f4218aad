"""The steps of a computation: prefill of a prompt, decode of a token, on a CPU or a GPU."""
