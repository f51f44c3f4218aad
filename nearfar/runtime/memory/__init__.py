"""The memory of a sequence (near rows, far rows, marks to return to) and of the machine."""
