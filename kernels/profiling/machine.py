"""The machine of a profile."""

import datetime
import importlib.metadata
import os
import platform
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Machine:
    """The machine and the versions of a profile; create it before measuring.

    threads       PyTorch's CPU threads
    load_average  the machine's load average over the last minute

    The version of a package that is not installed is None.
    """

    device: str
    cpu: str
    cores: int
    threads: int
    load_average: float
    python_version: str
    torch_version: str
    cuda_version: str | None
    triton_version: str | None
    liger_version: str | None
    nemo_version: str | None
    date: str
    command: str

    @classmethod
    def here(cls, device: torch.device) -> "Machine":
        cpu = cpu_name()
        return cls(
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
            cpu=cpu,
            cores=os.cpu_count() or 1,
            threads=torch.get_num_threads(),
            load_average=os.getloadavg()[0],
            python_version=platform.python_version(),
            torch_version=torch.__version__,
            cuda_version=torch.version.cuda,
            triton_version=_version("triton"),
            liger_version=_version("liger-kernel"),
            nemo_version=_version("nemo-automodel"),
            date=datetime.datetime.now(datetime.UTC).date().isoformat(),
            command=shlex.join(["python", *sys.argv]),
        )

    def __str__(self) -> str:
        return (
            f"{self.device}; CPU: {self.cores} cores, {self.threads} threads, load before {self.load_average:.1f}; "
            f"torch {self.torch_version}, triton {self.triton_version}, liger-kernel {self.liger_version}, "
            f"nemo-automodel {self.nemo_version}; {self.date}."
        )


def cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
