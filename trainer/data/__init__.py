"""Rows of a corpus to masked micro-batches."""
