"""Plan -> bytes: the only home of threads, tiles and progress."""
