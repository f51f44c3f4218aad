"""Memory planning: the bytes that a context will need, and a check that they are free."""
