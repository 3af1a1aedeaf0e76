"""Timing: interleaved rounds, clocks, quartiles; the machine's caches."""
