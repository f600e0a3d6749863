"""The distillation trainer, as a library."""
