"""A run: its arguments, plan, step, loop, metrics and export."""
