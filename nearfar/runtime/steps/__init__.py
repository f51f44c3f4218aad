"""Computing: a prompt is read, a token is decoded, on a CPU or a GPU."""
