"""The tasks: one kind a file, their names in `registry`."""
