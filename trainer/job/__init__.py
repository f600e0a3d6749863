"""The ranks of a job: who they are, how they watch each other, signals, and the command around them."""
