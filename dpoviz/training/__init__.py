"""Training: settings, rules for beta by name, the loop with observations, probes and checkpoints, the two stages."""
