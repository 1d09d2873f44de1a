"""Ways to train the layers: a mix-in for transformers' Trainer, exact factors, learning rates, statistics of ΔW."""
