"""How time is taken: interleaved rounds, clocks, quartiles; the caches of the machine."""
