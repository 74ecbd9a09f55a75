"""Whole runs: the small world, any model, the comparison, generated pairs, the benchmark; and their folders."""
