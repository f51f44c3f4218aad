"""Click commands, one file each. Importing this room imports no torch."""
