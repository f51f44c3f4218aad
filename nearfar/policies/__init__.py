"""One policy a file, the contract in `base`, the names in `registry`."""
