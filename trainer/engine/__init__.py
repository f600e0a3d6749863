"""DeepSpeed: config, optimisers, student and teacher engines, checkpoints."""
