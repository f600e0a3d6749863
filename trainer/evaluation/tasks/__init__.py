"""Tasks to fine-tune on: one protocol, and one file per kind of task."""
