"""Language models: loading, shared-prefix scoring, sampling, entropy estimates, the reference pass."""
