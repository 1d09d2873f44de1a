"""From a file or the hub to batches of token ids."""
