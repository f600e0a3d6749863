"""What must stand in the environment before torch is imported; imports nothing itself."""

import os

SETTINGS = {
    # OpenMP threads that wait by spinning keep the one they wait for off its core where anything else runs: the losses
    # took 3.75 s instead of 0.13 on 2 cores beside one busy process, and as long as before on idle ones.
    "OMP_WAIT_POLICY": "PASSIVE",
    # torch's: large pages for large tensors on CPUs, where the logits of a new micro-batch cost as much in page faults
    # as in writing them: a step of a small BERT took 0.88 of the time. (Both: November 2026.)
    "THP_MEM_ALLOC_ENABLE": "1",
}


# What cuBLAS needs for the same bits from run to run.
DETERMINISTIC_SETTINGS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def prepare_environment(full_determinism: bool = False) -> None:
    """Set what makes a command faster, or deterministic, and is not set yet; before torch is imported.

    ``run_command`` calls this for every command.
    """
    for name, value in (SETTINGS | (DETERMINISTIC_SETTINGS if full_determinism else {})).items():
        os.environ.setdefault(name, value)


def unprepared_environment() -> dict[str, str]:
    """The environment of a process that is to run as if no command of ours had started it."""
    return {name: value for name, value in os.environ.items() if SETTINGS.get(name) != value}
