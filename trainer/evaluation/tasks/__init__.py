"""Tasks to fine-tune on: one file per kind behind one protocol."""
