"""Samplers, one file a kind; `table` has them by name."""
