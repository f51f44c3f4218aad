"""What a sequence keeps: near rows, far rows, marks to return to, and the machine's memory."""
