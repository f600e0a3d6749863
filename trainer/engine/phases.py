"""The phases of a training step, by name, for profilers."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile, record_function

DATA, TEACHER, STUDENT, LOSSES = "data", "teacher", "student forward", "losses"
BACKWARD, UPDATE = "backward", "gradient reduction and update"
PHASES = (DATA, TEACHER, STUDENT, LOSSES, BACKWARD, UPDATE)
# Collectives overlap the other phases: those of gradients also count in the update or the backward pass.
COMMUNICATION, COLLECTIVES = "communication, within them", "c10d::"

_waits_for_device = False


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Label the block as a phase of the step; without a profiler this has no other effect."""
    with record_function(name):
        yield
        if _waits_for_device:
            torch.cuda.synchronize()


class PhaseProfile:
    """A context that times the phases of its steps with torch.profiler; on a GPU each phase is synchronised.

    Attributes:
        seconds: set on exit, the seconds of each phase; time outside the phases is not counted.
    """

    seconds: dict[str, float]

    def __enter__(self) -> "PhaseProfile":
        global _waits_for_device
        _waits_for_device = torch.cuda.is_available()
        self._profiler = profile(activities=[ProfilerActivity.CPU])
        self._profiler.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        global _waits_for_device
        _waits_for_device = False
        self._profiler.__exit__(*raised)
        averages = self._profiler.key_averages()
        microseconds = dict.fromkeys((*PHASES, COMMUNICATION), 0.0)
        for event in averages:
            if event.key in PHASES:
                microseconds[event.key] += event.cpu_time_total
            elif event.key.startswith(COLLECTIVES):
                microseconds[COMMUNICATION] += event.cpu_time_total
        self.seconds = {name: time / 1e6 for name, time in microseconds.items()}
