"""Training: settings, what gives beta by name, the loop, its observations, probes and checkpoints, the two stages."""
