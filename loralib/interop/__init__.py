"""Connections to other tools: peft, transformers' models, export, precision, sharding."""
