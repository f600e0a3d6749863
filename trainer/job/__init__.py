"""The ranks of a job: identity, failure detection, signals, and the command that runs in each."""
