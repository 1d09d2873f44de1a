"""Connections to other tools: peft, transformers' models, export, several adapters at once, precision, sharding."""
