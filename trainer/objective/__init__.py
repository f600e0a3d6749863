"""The losses of a micro-batch, one file per term."""
