"""Architectures: how a student follows from its teacher and how both are run, one file each."""
