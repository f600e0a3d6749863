"""Load teacher and student, and run them on packed rows."""
