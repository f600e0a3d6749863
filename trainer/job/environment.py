"""Environment variables that must be set before torch is imported; this module imports only ``os``."""

import os

SETTINGS = {
    # OpenMP threads that spin while they wait can keep the thread they wait for off its core. On 2 cores with another
    # busy process the losses took 3.75 s by spinning and 0.13 s without; on idle cores there was no difference.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Makes torch use large pages for large tensors on CPUs. Without them, page faults of a micro-batch's logits cost
    # as much as writing them. A step of a small BERT took 0.88 of the time. (Both measured in November 2026.)
    "THP_MEM_ALLOC_ENABLE": "1",
}


# cuBLAS needs this for bitwise reproducible runs.
DETERMINISTIC_SETTINGS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def prepare_environment(full_determinism: bool = False) -> None:
    """Set the variables that make a command faster or deterministic, unless set already; call before importing torch.

    ``run_command`` calls this for every command.
    """
    for name, value in (SETTINGS | (DETERMINISTIC_SETTINGS if full_determinism else {})).items():
        os.environ.setdefault(name, value)


def unprepared_environment() -> dict[str, str]:
    """Return the environment without the variables that ``prepare_environment`` sets."""
    return {name: value for name, value in os.environ.items() if SETTINGS.get(name) != value}
