"""Loading teacher and student, and running them on packed rows."""
