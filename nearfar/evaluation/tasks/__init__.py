"""What models are asked: one kind of task a file, their names in `registry`."""
