"""Connections to other tools: peft, transformers' models, precision, sharding."""
