"""Documents on disk: the file, the memory that is mapped from it, and the cache of such files."""
