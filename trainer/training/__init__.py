"""A training run: arguments, plan, step, loop, metrics and export."""
