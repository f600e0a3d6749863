"""Turn rows of a corpus into micro-batches with labels: masked tokens, or the next tokens."""
