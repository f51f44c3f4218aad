"""Documents on disk: the file format, writing it, and the memory that is mapped from it."""
