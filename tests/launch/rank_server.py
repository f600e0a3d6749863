"""Start ranks as forks of a process that has imported the trainer.

Importing it takes most of a small job's time. For tests of what the ranks compute; tests of commands, launchers and
signals start real commands.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from distilspeed.trainer.job.command import fast_imports

# All that a training of BERT imports. An evaluation imports more.
IMPORTS = (
    "datasets",
    "distilspeed.trainer.training.loop",
    "distilspeed.trainer.training.run",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "transformers.models.bert.modeling_bert",
    "transformers.models.distilbert.modeling_distilbert",
)


def run_ranks(
    command: list[str], variables: list[dict[str, str]], folder: Path, seconds: float
) -> subprocess.CompletedProcess[str]:
    """Run a Python script once for each set of environment variables, all at once, and wait for the ends.

    Args:
        command: the script and its arguments.
        variables: environment variables of each rank, beside those of this process.
        folder: the working directory.
        seconds: after so long a rank is ended by SIGALRM.

    Returns:
        The result: its exit status is the first one that is not 0, its output that of all ranks.
    """
    server = _server()
    with tempfile.TemporaryDirectory() as scratch:
        job = {
            "command": command,
            "environments": [{**os.environ, **more} for more in variables],
            "folder": str(folder),
            "seconds": round(seconds),
            "scratch": scratch,
        }
        assert server.stdin is not None
        assert server.stdout is not None
        print(json.dumps(job), file=server.stdin, flush=True)
        answer = server.stdout.readline()
        assert answer, f"the server of ranks ended with {server.wait()}"
        statuses = json.loads(answer)
        output, errors = ((Path(scratch) / name).read_text() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(command, next(filter(None, statuses), 0), output, errors)


@cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # Without threads, which a fork would lose: the first variable is for OpenMP, the second for pyarrow.
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "JE_ARROW_MALLOC_CONF": "background_thread:false",
            "DS_ACCELERATOR": "cpu",
        },
    )
    atexit.register(server.kill)
    return server


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print
    with fast_imports():
        for name in IMPORTS:
            __import__(name)
    gc.freeze()  # a fork that collects garbage would copy every page of the imports
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "an import has started a thread"
    for line in sys.stdin:
        job = json.loads(line)
        ranks = [_fork(job, environment) for environment in job["environments"]]
        statuses = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
        print(json.dumps(statuses), file=answers, flush=True)


def _fork(job: dict[str, Any], environment: dict[str, str]) -> int:
    """Fork a rank; return its process number."""
    child = os.fork()
    if child:
        return child
    signal.alarm(job["seconds"])
    for name, number in (("stdout", 1), ("stderr", 2)):
        file = os.open(Path(job["scratch"]) / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(job["folder"])
    script = job["command"][0]
    sys.argv = job["command"]
    sys.path[0] = str(Path(script).parent)
    # As the interpreter ends, but without coming back to the server's loop.
    status = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
