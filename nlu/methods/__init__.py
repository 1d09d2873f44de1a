"""How each method changes the model: one file per family, which lists its methods in ``METHODS``."""
