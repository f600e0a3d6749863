"""What launch/benchmark.py and launch/gpu_check.py measure and run."""
