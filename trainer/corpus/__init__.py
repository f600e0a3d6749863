"""Prepare a corpus: text to packed rows of tokens on disk."""
