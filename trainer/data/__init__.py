"""Turn rows of a corpus into masked micro-batches."""
