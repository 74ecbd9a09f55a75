"""Language models: load, score with a shared prefix, sample, estimate entropies, run the reference once."""
