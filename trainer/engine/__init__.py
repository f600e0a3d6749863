"""DeepSpeed: its config, optimisers, the engines of student and teacher, checkpoints."""
