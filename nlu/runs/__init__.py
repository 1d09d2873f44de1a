"""One run on disk: folder, record, digests, checkpoints, signals."""
