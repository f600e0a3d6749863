"""The losses' C++ kernels for CPUs: compiled at first use for the machine's vector instructions, then cached.

The compiled library is kept in ``TORCH_EXTENSIONS_DIR``, by default ``~/.cache/torch_extensions``.
"""

import hashlib
import logging
import os
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("cpu")
NAMESPACE = "distilspeed_cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Seconds that a process waits for another one's compilation, which takes about 15 on an idle machine.
LONGEST_WAIT = 600.0

# The compiler's flags by ``torch.backends.cpu.get_cpu_capability()``. On other processors the kernels are compiled for
# PyTorch's vectors without special instructions.
INSTRUCTIONS = {
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mf16c"),
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
}


def use_cpp(tensor: torch.Tensor) -> bool:
    """Return True if the C++ kernels run on ``tensor``."""
    return tensor.is_cpu and tensor.dtype in DTYPES and cpu_operators() is not None


class NoCompilerError(Exception):
    pass


@cache
def cpu_operators() -> Any:
    """Return the C++ kernels, ``torch.ops.distilspeed_cpu``; None if they cannot be compiled, which the log says once.

    The first call on a machine compiles them; other processes wait for it.
    """
    try:
        library = compiled_library()
        torch.ops.load_library(str(library))
    except (
        OSError,
        RuntimeError,
        ValueError,
        NoCompilerError,
        subprocess.CalledProcessError,
        Timeout,
    ) as error:
        logger.warning(
            "the losses on the CPU run in PyTorch, several times slower than in C++: %s", _reason(error)
        )
        return None
    return getattr(torch.ops, NAMESPACE)


def compiled_library() -> Path:
    """Return the path of the compiled kernels; compile them if this machine has not done so.

    Raises:
        NoCompilerError: there is no compiler.
        OSError: the folder cannot be written.
        ValueError: the compiler's messages cannot be read.
        RuntimeError: the user has no home directory, or the folder's file system no locks.
        subprocess.CalledProcessError: the compiler failed.
        Timeout: another process has been compiling for ten minutes.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in INSTRUCTIONS:
        capability = "DEFAULT"
    flags = [
        "-O3",
        "-std=c++20",
        "-fPIC",
        "-fopenmp",
        *INSTRUCTIONS.get(capability, ()),
        # These choose the branch of PyTorch's at::vec.
        f"-DCPU_CAPABILITY={capability}",
        f"-DCPU_CAPABILITY_{capability}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    ]
    content = b"".join(source.read_bytes() for source in sorted(SOURCES.iterdir()))
    identity = hashlib.sha256(content + " ".join([torch.__version__, *flags]).encode()).hexdigest()
    extensions = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions").expanduser()
    library = extensions / f"{NAMESPACE}_{identity[:16]}" / f"{NAMESPACE}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    # The system releases the lock of a process that dies.
    with FileLock(library.with_suffix(".lock"), timeout=LONGEST_WAIT):
        if not library.exists():
            logger.info(
                "compiling the losses' C++ kernels for %s, once on this machine: %s", capability, library
            )
            _compile(flags, library)
    return library


def _compile(flags: list[str], library: Path) -> None:
    # Imported here: it takes a quarter of a second.
    from torch.utils import cpp_extension

    unfinished = library.with_suffix(".unfinished")
    command = [
        *_compiler(),
        *flags,
        *(f"-I{folder}" for folder in cpp_extension.include_paths()),
        str(SOURCES / "kernels.cpp"),
        "-shared",
        *(f"-L{folder}" for folder in cpp_extension.library_paths()),
        *("-lc10", "-ltorch_cpu", "-ltorch"),
        *("-o", str(unfinished)),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    unfinished.replace(library)


def _compiler() -> list[str]:
    """Return the compiler's command; ``CXX`` may be "ccache g++".

    Raises:
        NoCompilerError: there is no such command.
    """
    named = os.environ.get("CXX") or "c++"
    try:
        command = shlex.split(named)
    except ValueError:  # a quote without an end
        command = []
    if not command or shutil.which(command[0]) is None:
        raise NoCompilerError(f"there is no compiler {named}; install g++, or set CXX to a C++ compiler")
    return command


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        errors = [line for line in error.stderr.splitlines() if "error" in line]
        return f"{error.cmd[0]} cannot compile them: {(errors or [f'exit status {error.returncode}'])[0]}"
    if isinstance(error, NoCompilerError):
        return str(error)
    reason = str(error.__cause__ or error)  # why a library cannot be loaded is only in the cause
    return f"{reason.rstrip('.')}; set TORCH_EXTENSIONS_DIR to another folder"
