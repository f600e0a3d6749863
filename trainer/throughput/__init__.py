"""Measurements and checks for launch/benchmark.py and launch/gpu_check.py."""
