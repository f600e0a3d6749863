"""Architectures: how a student follows from its teacher, one file each."""
