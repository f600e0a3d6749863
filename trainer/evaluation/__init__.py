"""What a model is worth: held-out quality, latency, tasks, and the report."""
