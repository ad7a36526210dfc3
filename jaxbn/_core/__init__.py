"""Batch norm in plain JAX: moments, normalization, the rule and the running state."""
