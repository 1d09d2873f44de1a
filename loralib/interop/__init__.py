"""Connections to other tools: peft's format and methods, export, several adapters at once, precision, sharding."""
