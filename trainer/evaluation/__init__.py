"""Evaluate models: held-out quality, latency, tasks, and the report."""
