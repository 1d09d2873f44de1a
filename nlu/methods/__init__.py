"""How each method changes the model: one file a family."""
