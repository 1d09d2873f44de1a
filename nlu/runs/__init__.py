"""One run on disk: folder, record, digests, checkpoints, signals."""

LOCK, RECORD = ".lock", "results.json"  # names in a run's folder
