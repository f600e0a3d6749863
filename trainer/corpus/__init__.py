"""Text to packed rows of tokens on disk."""
