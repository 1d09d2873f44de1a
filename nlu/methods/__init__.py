"""How each method changes the model: one file a family, which lists its methods in ``METHODS``."""
