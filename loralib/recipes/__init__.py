"""Ways to train the layers: a Trainer mix-in, checkpoints, exact factors, learning rates, statistics of ΔW."""
