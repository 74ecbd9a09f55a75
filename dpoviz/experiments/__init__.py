"""Whole runs and their folders: the small world, any model, the comparison, generated pairs, the benchmark."""
