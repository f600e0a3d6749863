"""Measuring a training's throughput against the eager recipe; behind ``launch/benchmark.py``."""
