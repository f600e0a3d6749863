"""The losses of a micro-batch."""
