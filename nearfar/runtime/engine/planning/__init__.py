"""Memory before it is taken: what a context will need, and whether it is there."""
