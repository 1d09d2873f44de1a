"""Experiment files, the runs of a sweep, and how they are started."""
